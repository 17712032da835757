"""Buckets on this machine: the part of Google Cloud Storage's JSON API that gcsfs, tensorstore and
orbax speak.

Objects are kept in memory. Anybody may use a bucket, apart from those named "private", for which a
request without a token is answered as Google does.
"""

import http.server
import itertools
import json
import re
import sys
import threading
import time
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 20  # names a page of a listing, so that some have several


class Server(http.server.ThreadingHTTPServer):
  """Listens on a free port of the loopback from the moment it is made; `with` stops it.

  Attributes:
    objects: {(bucket, name): (generation, content)}.
    requests: [(method, path)] so far.
    environment: variables that send the libraries of another process here.
  """

  daemon_threads = True

  def __init__(self, *buckets):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.buckets, self.objects, self.requests, self.uploads = set(buckets), {}, [], {}
    self.lock, self.numbers = threading.RLock(), itertools.count(1)
    url = f"http://127.0.0.1:{self.server_port}"
    self.environment = {
      "STORAGE_EMULATOR_HOST": url,  # gcsfs and google.cloud
      "TENSORSTORE_GCS_HTTP_URL": url,
      "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",  # tensorstore would look for credentials
      "NO_GCE_CHECK": "true",  # google.auth would look for a cloud machine around it,
      "GOOGLE_APPLICATION_CREDENTIALS": "",
      "CLOUDSDK_CONFIG": "/none",  # or find those of whoever runs the tests
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }  # gcsfs would ask for the kind of bucket by gRPC
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def __exit__(self, *_):
    self.shutdown()
    self.server_close()

  def handle_error(self, request, client_address):
    """A client that has what it wanted may hang up in the middle of an answer."""
    if not isinstance(sys.exception(), ConnectionError):
      super().handle_error(request, client_address)

  def names(self, bucket):
    """Of the objects in a bucket, in order."""
    with self.lock:
      return sorted(name for where, name in self.objects if where == bucket)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True  # a header and a body that wait for each other cost 40 ms each

  def log_message(self, *_):
    pass

  def _answer(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    with self.server.lock:
      self.server.requests.append((self.command, self.path))
      if self.path.startswith("/batch/"):
        status, headers, content = self._batch(body)
      else:
        status, headers, content = self._do(self.command, self.path, body)
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_DELETE = _answer

  def _do(self, method, path, body):
    """(status, headers, content) of a request."""
    url = urlsplit(path)
    query = {key: values[0] for key, values in parse_qs(url.query).items()}
    match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", url.path)
    if not match:
      return self._error(404, f"{method} {path} is not in the fake")
    kind, bucket, name = match[1], match[2], match[3]
    if bucket not in self.server.buckets:
      return self._error(404, "The specified bucket does not exist.")
    if bucket == "private" and "Authorization" not in self.headers:
      return self._error(
        401,
        "Anonymous caller does not have storage.objects.get access to the Google Cloud Storage "
        "object.",
      )
    if kind == "upload/":
      return self._upload(bucket, query, body)
    if url.path.endswith("/o"):
      return self._list(bucket, query)
    if name is None:
      return self._json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "US"})
    source, _, target = name.partition("/rewriteTo/b/")
    source = unquote(source)
    found = self.server.objects.get((bucket, source))
    if method == "GET" and str(found and found[0]) == query.get("ifGenerationNotMatch"):
      return 304, {}, b""
    if failed := self._precondition(found, query):
      return failed
    if found is None:
      return self._error(404, f"No such object: {bucket}/{source}")
    if target:
      target_bucket, _, target_name = target.partition("/o/")
      return self._json(
        {"done": True, "resource": self._store(target_bucket, unquote(target_name), found[1])}
      )
    if method == "DELETE":
      del self.server.objects[bucket, source]
      return 204, {}, b""
    if query.get("alt") == "media":
      return self._media(*found)
    return self._json(self._describe(bucket, source))

  def _media(self, generation, content):
    headers = {
      "X-Goog-Generation": str(generation),
      "X-Goog-Stored-Content-Length": str(len(content)),
      "Content-Type": "application/octet-stream",
    }
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if not wanted:
      return 200, headers, content
    first = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
    last = min(int(wanted[2]), len(content) - 1) if wanted[1] and wanted[2] else len(content) - 1
    if first > last:
      return self._error(416, "The requested range cannot be satisfied.")
    return (
      206,
      headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"},
      content[first : last + 1],
    )

  def _upload(self, bucket, query, body):
    if query.get("upload_id"):
      return self._resume(query["upload_id"], body)
    kind, name = query["uploadType"], query.get("name")
    if kind == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      described, content = (
        re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + boundary)[1:3]
      )
      name, body = json.loads(described)["name"], re.sub(rb"\r?\n\Z", b"", content)
    if failed := self._precondition(self.server.objects.get((bucket, name)), query):
      return failed
    if kind == "resumable":
      number = str(next(self.server.numbers))
      self.server.uploads[number] = (bucket, name, b"")
      host = self.server.environment["STORAGE_EMULATOR_HOST"]
      where = f"{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
      return 200, {"Location": f"{where}&upload_id={number}"}, b""
    return self._json(self._store(bucket, name, body))

  def _resume(self, number, body):
    bucket, name, content = self.server.uploads[number]
    content += body
    self.server.uploads[number] = (bucket, name, content)
    total = self.headers["Content-Range"].rpartition("/")[2]
    if total == "*" or len(content) < int(total):
      return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
    return self._json(self._store(bucket, name, content))

  def _list(self, bucket, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    entries = {}  # names and common prefixes, in order
    for name in self.server.names(bucket):
      if name.startswith(prefix) and query.get("startOffset", "") <= name < query.get(
        "endOffset", "\U0010ffff"
      ):
        head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (None, "", None)
        entries[prefix + head + cut if cut else name] = bool(cut)
    names, size = sorted(entries), min(PAGE, int(query.get("maxResults", PAGE)))
    names = [name for name in names if name > query.get("pageToken", "")]
    page = {
      "kind": "storage#objects",
      "prefixes": [name for name in names[:size] if entries[name]],
      "items": [self._describe(bucket, name) for name in names[:size] if not entries[name]],
    }
    return self._json(page | ({"nextPageToken": names[size - 1]} if names[size:] else {}))

  def _batch(self, body):
    """Several deletions in one request."""
    parts = []
    for method, path in re.findall(rb"^(DELETE) (\S+) HTTP/1.1", body, re.M):
      status, _, content = self._do(method.decode(), path.decode(), b"")
      parts.append(
        b"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 %d X\r\n\r\n%s\r\n"
        % (status, content)
      )
    return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, b"".join(parts) + b"--batch--"

  def _precondition(self, found, query):
    """The answer to a request that asks for another generation.

    None if there is nothing against it. 0: no such object.
    """
    wanted = query.get("ifGenerationMatch")
    if wanted is not None and int(wanted) != (found[0] if found else 0):
      return self._error(412, "At least one of the pre-conditions you specified did not hold.")
    return None

  def _store(self, bucket, name, content):
    self.server.objects[bucket, name] = (
      time.time_ns() // 1000 * 1000 + next(self.server.numbers) % 1000,
      content,
    )
    return self._describe(bucket, name)

  def _describe(self, bucket, name):
    generation, content = self.server.objects[bucket, name]
    when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(generation // 10**9))
    return {
      "kind": "storage#object",
      "name": name,
      "bucket": bucket,
      "size": str(len(content)),
      "generation": str(generation),
      "metageneration": "1",
      "updated": when,
      "timeCreated": when,
    }

  def _json(self, value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

  def _error(self, status, message):
    return (
      status,
      {"Content-Type": "application/json"},
      json.dumps({"error": {"code": status, "message": message}}).encode(),
    )

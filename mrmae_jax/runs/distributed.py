"""Connects the processes of a run: they exchange small texts, and fail together with a clear line.

JAX's own runtime does the work. This module adds a time limit that ends in a message instead of an
abort in C++, and an exchange of texts that names a missing host. The exchange uses the
coordinator's key-value store, not the devices, so it works before anything is compiled.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time

import jax
from absl import logging

from mrmae_jax.errors import DistributedError, LostError, one_line

HEARTBEAT_S = SHUTDOWN_S = 30  # JAX waits 100 and 300 s by default
NOTICE_S = 20  # between two lines about processes that have not come
LINGER_S = 10  # how long process 0 still answers after it gave up
EXCHANGE_S = 25  # for the others to come to an exchange
FAREWELL_S = 10  # for the others to report their errors before process 0 ends
LAST_S = 1  # between the last report of the others and the end of process 0
_LEAVING = "mrmae_jax/leaving"
_rounds = itertools.count()
_is_leaving = False


def start(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout_s: int
) -> None:
  """Connects this process to the others; call it before anything asks for devices.

  While it waits, the process prints every NOTICE_S seconds what is missing. After `timeout_s` it
  prints the reason and exits: JAX itself would abort without a message in Python.

  Args:
    coordinator_address: HOST:PORT of process 0. None reads MRMAE_COORDINATOR_ADDRESS from the
      environment; without that JAX detects it (TPU VM, GKE, Slurm, Open MPI).
    num_processes: number of processes. None reads MRMAE_NUM_PROCESSES, or JAX detects it.
    process_id: number of this process. None reads MRMAE_PROCESS_ID, or JAX detects it.
    timeout_s: how long to wait for the others.

  Raises:
    DistributedError: values that contradict each other or those of the other processes, or nothing
      from which JAX could detect them; a port that is in use.
  """
  address, count, index = _complete(coordinator_address, num_processes, process_id)
  if index == 0:
    _check_port(address)
  connected = threading.Event()
  arguments = (connected, timeout_s, index, count, address)
  threading.Thread(target=_report_waiting, args=arguments, daemon=True).start()
  try:
    jax.distributed.initialize(
      address,
      count,
      index,
      initialization_timeout=timeout_s + 60,
      heartbeat_timeout_seconds=HEARTBEAT_S,
      shutdown_timeout_seconds=SHUTDOWN_S,
    )
  except (ValueError, RuntimeError) as error:
    raise DistributedError(
      f"jax.distributed.initialize: {one_line(error, 1000)}. Outside TPU VMs and Slurm, give "
      "--coordinator_address, --num_processes and --process_id"
    ) from None
  finally:
    connected.set()
  devices = jax.local_devices()
  print(
    f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
    f"{len(devices)} x {devices[0].device_kind} here, {jax.device_count()} in all",
    flush=True,
  )
  agree("number of processes", {"--num_processes": count})  # JAX takes that of process 0 for all


def _complete(
  address: str | None, count: int | None, index: int | None
) -> tuple[str | None, int | None, int | None]:
  """Fills in values from the environment, and checks that they fit together."""
  env = os.environ
  try:
    if count is None and "MRMAE_NUM_PROCESSES" in env:
      count = int(env["MRMAE_NUM_PROCESSES"])
    if index is None and "MRMAE_PROCESS_ID" in env:
      index = int(env["MRMAE_PROCESS_ID"])
  except ValueError as error:
    raise DistributedError(
      f"MRMAE_NUM_PROCESSES and MRMAE_PROCESS_ID must be whole numbers: {error}"
    ) from None
  address = address or env.get("MRMAE_COORDINATOR_ADDRESS")
  values = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
  missing = [name for name, value in values.items() if value is None]
  if len(missing) == 3:
    return address, count, index
  if missing:
    raise DistributedError(
      f"{', '.join(missing)} must be given too: the three go together (give none on TPU VMs, GKE "
      "and Slurm, where JAX detects them)"
    )
  if not 0 <= index < count:
    raise DistributedError(
      f"--process_id={index} must be one of 0 to {count - 1} with --num_processes={count}"
    )
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise DistributedError(
      f"--coordinator_address={address} must be HOST:PORT of process 0, e.g. 10.0.0.2:8476"
    )
  return address, count, index


def _check_port(address: str) -> None:
  """Checks that process 0 can listen: jaxlib may crash where it cannot.

  Raises:
    LostError: the port is in use, or reserved.
  """
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  try:
    port = int(address.rpartition(":")[2])
    socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
  except OSError as error:
    raise LostError(
      f"process 0 cannot listen at {address} ({os.strerror(error.errno)}): an earlier run may not "
      "have ended; end it, or give all processes another port in --coordinator_address"
    ) from None


def _report_waiting(
  connected: threading.Event,
  timeout_s: int,
  index: int | None,
  count: int | None,
  address: str | None,
) -> None:
  """Prints what is missing while `jax.distributed.initialize` waits; ends the process in time.

  Runs in a thread of its own: the main thread is inside C++, where it would abort the process
  without a message.
  """
  start_time = time.monotonic()
  waited = lambda: time.monotonic() - start_time
  name = "a process" if index is None else f"process {index} of {count}"

  def status() -> str:
    text = f"{name} waited {int(waited())} s for the others at "
    if address is None:
      return text + "the address that JAX detected"
    problem = _reach(address)
    if index == 0 and not problem.startswith("the name"):
      return text + address
    return f"{text}{address}; {problem or f'{address} answers, so others have not come'}"

  while not connected.wait(min(NOTICE_S, max(0, timeout_s - waited()))):
    if waited() < timeout_s:
      print(f"{status()}; still waiting, up to {timeout_s} s (--init_timeout)", flush=True)
      continue
    print(
      f"error: {status()}. Are all of them started, with the same --num_processes, and does the "
      "network let them through?",
      file=sys.stderr,
      flush=True,
    )
    if index == 0:
      time.sleep(LINGER_S)  # processes that started a little later still find that it answers
    os._exit(LostError.exit_code)


def _reach(address: str) -> str:
  """Returns why HOST:PORT cannot be reached, or "" if something listens there."""
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
      return ""
  except (socket.gaierror, UnicodeError) as error:
    return f"the name {host} is not known here ({one_line(error)})"
  except OSError:
    return f"nothing answers at {address}"


def exchange(occasion: str, text: str, timeout_s: float | None = None) -> list[str]:
  """Returns the texts of all processes, in their order.

  All processes must call it, in the same order of occasions. It is also a barrier.

  Args:
    occasion: name for the error message.
    text: text of this process.
    timeout_s: how long to wait for the others, EXCHANGE_S by default.

  Raises:
    LostError: some processes did not call in time; the message names them.
  """
  if jax.process_count() == 1:
    return [text]
  timeout_s = EXCHANGE_S if timeout_s is None else timeout_s
  key = f"mrmae_jax/{next(_rounds)}/{occasion}"
  _store().key_value_set(f"{key}/{jax.process_index()}", text)
  texts = _read_texts(key, timeout_s)
  missing = [str(index) for index, text in enumerate(texts) if text is None]
  if missing:
    raise LostError(
      f"process {jax.process_index()} waited {timeout_s} s at {occasion!r} for process "
      f"{', '.join(missing)} of {jax.process_count()}; look at the log there"
    )
  return texts


def _store():
  """Returns the coordinator's key-value store; None if the process is not connected."""
  from jax._src import distributed  # it has no public name; orbax uses it, too

  return distributed.global_state.client


def _read_texts(key: str, timeout_s: float) -> list[str | None]:
  """Returns what each process has written under a key, None for those that are late."""
  end = time.monotonic() + timeout_s
  texts = []
  for index in range(jax.process_count()):
    left_ms = max(1, int(1000 * (end - time.monotonic())))
    try:
      texts.append(_store().blocking_key_value_get(f"{key}/{index}", left_ms))
    except Exception as error:  # jaxlib's own type
      logging.info("%s/%d: %s", key, index, error)
      texts.append(None)
  return texts


def leave(code: int, reason: str = "") -> None:
  """Ends a process that failed. A normal exit would wait for the others, which may wait for it.

  The end of process 0, which keeps the store, ends all processes. It therefore waits FAREWELL_S
  for the others to report their errors.

  Args:
    code: exit code.
    reason: the error in one line, for the others (see `who_left`); "" if the others need not end.
  """
  global _is_leaving
  _is_leaving = True
  sys.stdout.flush()
  sys.stderr.flush()
  if _store() is not None:
    try:
      _store().key_value_set(f"{_LEAVING}/{jax.process_index()}", reason)
    except Exception as error:  # the coordinator is gone, and with it the other processes
      logging.info("leaving: %s", error)
    if jax.process_index() == 0:
      _read_texts(_LEAVING, FAREWELL_S)
      time.sleep(LAST_S)
  os._exit(code)


def who_left() -> str:
  """Returns the errors of processes that have failed: "process 1 has ended: ...".

  Returns "" if none has failed, or if this process is ending.
  """
  if _is_leaving or _store() is None:
    return ""
  try:
    reasons = _store().key_value_dir_get(_LEAVING)
  except Exception as error:  # jaxlib's own type; without a coordinator JAX ends this process
    logging.info("who left: %s", error)
    return ""
  return "; ".join(
    f"process {key.rpartition('/')[2]} has ended: {reason}"
    for key, reason in sorted(reasons)
    if reason
  )


def agree(occasion: str, values: dict, error: str | None = None) -> None:
  """Checks that all processes have the same values and no error.

  Args:
    occasion: name for the error message.
    values: flat, JSON values that must be the same everywhere.
    error: what went wrong on this process, if anything did.

  Raises:
    DistributedError: on every process, if one has an error or other values than process 0.
  """
  if jax.process_count() == 1:
    return
  texts = exchange(occasion, json.dumps({"values": values, "error": error}))
  if problems := _disagreements([json.loads(text) for text in texts]):
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise DistributedError("; ".join(problems[:3]) + more)


def _disagreements(reports: list[dict]) -> list[str]:
  """Returns the errors of the processes, or else the values that differ from those of process 0."""
  lines = lambda error: error.replace("\n", "; ")
  errors = [f"process {i}: {lines(r['error'])}" for i, r in enumerate(reports) if r["error"]]
  if errors:
    return errors
  first = reports[0]["values"]
  return [
    f"{key} is {first.get(key)!r} on process 0 and {report['values'].get(key)!r} on process {i}"
    for i, report in enumerate(reports)
    for key in sorted(first.keys() | report["values"].keys())
    if first.get(key) != report["values"].get(key)
  ]

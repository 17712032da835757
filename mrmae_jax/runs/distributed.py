"""Several hosts as one: they find each other, speak in small texts, and fail together with a clear line.

JAX's own runtime does the work. What is added: a time limit that ends in a message instead of an abort in C++, and an exchange of
texts that says which host is missing. The exchange goes through the coordinator's key-value store, not through the devices: it
works before anything is compiled, and a host that is late or gone is named.
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

from mrmae_jax.errors import DistributedError, LostError

HEARTBEAT_S = SHUTDOWN_S = 30  # JAX waits 100 and 300 s by default
NOTICE_S = 20  # between two lines about others that have not come
LINGER_S = 10
_rounds = itertools.count()
_leaving = False


def start(
  coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout_s: int
) -> None:
  """Connects this process to the others; call it before anything asks for devices.

  Args:
    coordinator_address: HOST:PORT of process 0; None: JAX finds out (TPU VM, GKE, Slurm, Open MPI). Environment variables
      MRMAE_COORDINATOR_ADDRESS, MRMAE_NUM_PROCESSES and MRMAE_PROCESS_ID stand in for None.
    num_processes, process_id: likewise.
    timeout_s: how long to wait for the others. Meanwhile the process says every 20 s what is missing; after that it prints why
      and exits: JAX itself would abort, without a word in Python.

  Raises:
    DistributedError: values that do not go together, here or with those of the other processes, or nothing from which JAX could
      find out.
  """
  env = os.environ
  address = coordinator_address or env.get("MRMAE_COORDINATOR_ADDRESS")
  try:
    count = (
      int(env["MRMAE_NUM_PROCESSES"])
      if num_processes is None and "MRMAE_NUM_PROCESSES" in env
      else num_processes
    )
    index = (
      int(env["MRMAE_PROCESS_ID"])
      if process_id is None and "MRMAE_PROCESS_ID" in env
      else process_id
    )
  except ValueError as error:
    raise DistributedError(
      f"MRMAE_NUM_PROCESSES and MRMAE_PROCESS_ID must be whole numbers: {error}"
    ) from None
  given = {"--coordinator_address": address, "--num_processes": count, "--process_id": index}
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < 3:
    raise DistributedError(
      f"{', '.join(missing)} must be given too: the three go together (none: found out on TPU VMs, GKE, Slurm)"
    )
  if not missing and not 0 <= index < count:
    raise DistributedError(
      f"--process_id={index} must be one of 0 to {count - 1} with --num_processes={count}"
    )
  if not missing and not address.rpartition(":")[2].isdigit():
    raise DistributedError(
      f"--coordinator_address={address} must be HOST:PORT of process 0, e.g. 10.0.0.2:8476"
    )

  arrived = threading.Event()
  threading.Thread(
    target=_wait_with_words, args=(arrived, timeout_s, index, count, address), daemon=True
  ).start()
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
      f"jax.distributed.initialize: {' '.join(str(error).split())}. On machines that are no TPU VM and run "
      "no Slurm, give --coordinator_address, --num_processes and --process_id"
    ) from None
  finally:
    arrived.set()
  devices = jax.local_devices()
  print(
    f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {len(devices)} x "
    f"{devices[0].device_kind} here, {jax.device_count()} in all",
    flush=True,
  )
  agree("number of processes", {"--num_processes": count})  # JAX takes that of process 0 for all


def _wait_with_words(
  arrived: threading.Event,
  timeout_s: int,
  index: int | None,
  count: int | None,
  address: str | None,
) -> None:
  """Says what is waited for while `jax.distributed.initialize` is silent, and ends the process when it has waited long enough."""
  began = time.monotonic()
  who = "a process" if index is None else f"process {index} of {count}"
  where = address or "the address that JAX found out"

  def so_far():
    reached = (
      ""
      if address is None or index == 0
      else (
        f"; {address} answers, so others have not come"
        if _answers(address)
        else f"; nothing answers at {address}"
      )
    )
    return f"{who} waited {int(time.monotonic() - began)} s for the others at {where}{reached}"

  while not arrived.wait(min(NOTICE_S, max(0, timeout_s - (time.monotonic() - began)))):
    if time.monotonic() - began < timeout_s:
      print(f"{so_far()}; going on for up to {timeout_s} s (--init_timeout)", flush=True)
      continue
    print(
      f"error: {so_far()}. Are all of them started, with the same --num_processes, and does the network let them through?",
      file=sys.stderr,
      flush=True,
    )
    if index == 0:
      time.sleep(LINGER_S)  # those that began a little later shall still find that it answers
    os._exit(
      LostError.exit_code
    )  # the main thread is inside C++ and would abort the process without a message


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    with socket.create_connection((host, int(port)), timeout=2):
      return True
  except OSError:
    return False


def exchange(what: str, text: str, timeout_s: int = 25) -> list[str]:
  """What every process gives, by process; all of them must call, in the same order. It is also a barrier.

  Args:
    what: name of the occasion, for the message.
    text: of this process.
    timeout_s: how long to wait for the others.

  Raises:
    LostError: some did not call in time; names them.
  """
  if jax.process_count() == 1:
    return [text]
  occasion = f"mrmae_jax/{next(_rounds)}/{what}"
  _store().key_value_set(f"{occasion}/{jax.process_index()}", text)
  texts = _read(occasion, timeout_s)
  missing = [str(index) for index, found in enumerate(texts) if found is None]
  if missing:
    raise LostError(
      f"process {jax.process_index()} waited {timeout_s} s at {what!r} for process {', '.join(missing)} of "
      f"{jax.process_count()}; look at the log there"
    )
  return texts


def _store():
  """The coordinator's key-value store; None in a process that is alone."""
  from jax._src import distributed  # it has no public name, orbax uses it so too

  return distributed.global_state.client


def _read(occasion: str, timeout_s: float) -> list[str | None]:
  """What each process has written under a name, None where nothing comes in time."""
  end, texts = time.monotonic() + timeout_s, []
  for index in range(jax.process_count()):
    try:
      texts.append(
        _store().blocking_key_value_get(
          f"{occasion}/{index}", max(1, int(1000 * (end - time.monotonic())))
        )
      )
    except Exception as error:  # jaxlib's own type; whatever it is, that one is missing
      logging.info("%s/%d: %s", occasion, index, error)
      texts.append(None)
  return texts


def leave(code: int, why: str = "") -> None:
  """Ends a process that failed. A normal exit would wait for the others, which may be waiting for this one.

  The end of process 0, which keeps the store, is the end of all: it gives the others ten seconds to say what is wrong with them.

  Args:
    code: exit code.
    why: the error in a line, for the others (see `who_left`); "" for a process whose end is no reason for theirs.
  """
  global _leaving
  _leaving = True
  sys.stdout.flush()
  sys.stderr.flush()
  if _store() is not None:
    try:
      _store().key_value_set(f"mrmae_jax/leaving/{jax.process_index()}", why)
    except Exception as error:  # the coordinator is gone: nobody is left to tell
      logging.info("leaving: %s", error)
    if jax.process_index() == 0:
      _read("mrmae_jax/leaving", 10)
      time.sleep(1)  # between their last word and their end
  os._exit(code)


def who_left() -> str:
  """What other processes said that ended with an error: "process 1 has ended: ..."; "" if none did, or if this one is ending."""
  if _leaving or _store() is None:
    return ""
  try:
    found = _store().key_value_dir_get("mrmae_jax/leaving")
  except Exception as error:  # jaxlib's own type; no coordinator: JAX ends this process
    logging.info("who left: %s", error)
    return ""
  return "; ".join(
    f"process {key.rpartition('/')[2]} has ended: {why}" for key, why in sorted(found) if why
  )


def agree(what: str, values: dict, error: str | None = None) -> None:
  """Raises DistributedError on every process if some has an error or other values than process 0.

  Args:
    what: name of the occasion.
    values: flat, JSON values that must be the same everywhere.
    error: what went wrong on this process, if anything did.
  """
  if jax.process_count() == 1:
    return
  found = [
    json.loads(text) for text in exchange(what, json.dumps({"values": values, "error": error}))
  ]
  problems = [f"process {i}: {one['error']}" for i, one in enumerate(found) if one["error"]]
  if not problems:
    first = found[0]["values"]
    problems = [
      f"{key} is {first.get(key)!r} on process 0 and {one['values'].get(key)!r} on process {i}"
      for i, one in enumerate(found)
      for key in sorted(first.keys() | one["values"].keys())
      if first.get(key) != one["values"].get(key)
    ]
  if problems:
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    raise DistributedError("; ".join(problems[:3]) + more)

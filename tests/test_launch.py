"""The launch scripts, run against stand-ins of gcloud, sbatch, kubectl and others on this machine.

The stand-ins come first on PATH. Two folders play the hosts of a slice; the training is a small
program that notes how it was started and ends as a plan tells it.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), LAUNCH / "slurm.sbatch"])
AWKWARD = [
  "--config=configs/mrmae.py:base,masking=random",
  '--config.data.source=folder:/my images/it\'s "here" & $HOME; *',
  "--config.teacher.path=",
]
# The training. A plan is one word per start: an exit code, "slow", "hang" (until SIGTERM, then 75),
# "preempt" (the slice is gone).
PAYLOAD = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
cloud = pathlib.Path(os.environ["CLOUD"])
number = os.environ.get("SLURM_PROCID") or os.environ.get("MRMAE_PROCESS_ID")
host = number or pathlib.Path.home().name
with open(cloud / "calls", "a") as calls:
  calls.write(json.dumps(dict(host=host, words=sys.argv[1:], env=dict(os.environ))) + "\\n")
plan = cloud / f"plan-{{host}}"
word, *rest = plan.read_text().split() if plan.exists() else "0"
plan.write_text(" ".join(rest or "0"))
print("training", word, flush=True)
if word == "preempt":
  (cloud / "slice").write_text("SUSPENDED")
  os.killpg(0, signal.SIGKILL)
if word == "hang":
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  time.sleep(60)
if word == "slow":
  time.sleep(4)
  sys.exit(0)
sys.exit(int(word))
"""
STAND_INS = {
  "uv": """#!/usr/bin/env bash
echo uv "$@" >> "$CLOUD/log"
if [ "$1" = venv ]; then mkdir -p "$4/bin" && cp "$CLOUD/bin/python" "$4/bin/python"; fi
""",
  "nvidia-smi": "#!/bin/sh\n",
  "sleep": "#!/bin/sh\nexec /bin/sleep 0.05\n",
  # A slice of two hosts. It waits once in the queue; its folders are new each time.
  "gcloud": f"""#!{sys.executable}
import os, pathlib, shutil, subprocess, sys, time
cloud, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with open(cloud / "log", "a") as log:
  print("gcloud", *words, file=log)
assert words[:2] == ["compute", "tpus"] and "--zone=here-1a" in words, words
group, verb, name = words[2:5]
options = [word.removeprefix("--") for word in words if word.startswith("--") and "=" in word]
options = dict(word.split("=", 1) for word in options)
slice, hosts = cloud / "slice", [cloud / "hosts" / i for i in "01"]
if verb == "create":
  assert group == "queued-resources" and not slice.exists() and options["node-id"] == name == "pod"
  slice.write_text("WAITING_FOR_RESOURCES")
elif not slice.exists():
  sys.exit(f"ERROR: (gcloud) NOT_FOUND: Resource {{name}} was not found")
elif verb == "describe" and group == "queued-resources":
  print(state := slice.read_text())
  if state == "WAITING_FOR_RESOURCES":
    slice.write_text("ACTIVE")
    for host in hosts: host.mkdir(parents=True)
elif verb == "describe":
  print("READY")
elif verb == "delete":
  assert "--force" in words and "--quiet" in words
  slice.unlink()
  shutil.rmtree(cloud / "hosts")
else:
  assert slice.read_text() == "ACTIVE"
  chosen = hosts if options["worker"] == "all" else [hosts[int(options["worker"])]]
  if verb == "scp":
    assert words[5] == "pod:"
    for host in chosen: shutil.copy(name, host)
  else:
    command, lost = options["command"], cloud / "lose connection"
    env = lambda host: os.environ | dict(HOME=str(host))
    start = lambda host: subprocess.Popen(["bash", "-c", command], cwd=host, env=env(host))
    processes = [start(host) for host in chosen]
    if "host.sh run" in command and lost.exists():
      while not (cloud / "calls").exists(): time.sleep(0.1)
      lost.unlink()
      for process in processes: process.kill()
      sys.exit(255)
    codes = [process.wait() for process in processes]
    sys.exit(next((code for code in codes if code), 0))
""",
  # Runs a copy of the script as Slurm would, again when it has been put back into the queue.
  "sbatch": f"""#!{sys.executable}
import os, pathlib, re, shutil, subprocess, sys
cloud, script, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1], sys.argv[2:]
text = pathlib.Path(script).read_text()
options = dict(re.findall("^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
assert "requeue" in options and options["signal"] == "B:TERM@120"
shutil.copy(script, cloud / "copy")
last = int(options.get("array", "0-0").split("%")[0].split("-")[1])
for task in range(last + 1):
  for restart in range(9):
    (cloud / "requeued").unlink(missing_ok=True)
    env = os.environ | dict(
      SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=os.getcwd(), SLURM_RESTART_COUNT=str(restart),
      SLURM_NNODES="1", SLURM_NTASKS=os.environ.get("tasks", "2"), SLURM_GPUS_ON_NODE="8",
      SLURM_ARRAY_TASK_ID=str(task))
    process = subprocess.Popen(["bash", str(cloud / "copy"), *words], env=env, cwd="/")
    (cloud / "batch").write_text(str(process.pid))
    code = process.wait()
    if not (cloud / "requeued").exists(): break
print(code)
""",
  "srun": f"""#!{sys.executable}
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
numbers = range(int(os.environ["SLURM_NTASKS"]))
start = lambda i: subprocess.Popen(sys.argv[2:], env=os.environ | dict(SLURM_PROCID=str(i)))
tasks = [start(i) for i in numbers]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(task.wait() for task in tasks))
""",
  "squeue": "#!/bin/sh\necho ${job_state:-RUNNING}\n",
  "scontrol": '#!/bin/sh\necho "$@" >> $CLOUD/log\ntouch $CLOUD/requeued\n',
  # Runs a JobSet: every index, from the start again by the manifest's own rules.
  "kubectl": f"""#!{sys.executable}
import os, pathlib, re, subprocess, sys, yaml
cloud, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with open(cloud / "log", "a") as log:
  print("kubectl", *words, file=log)
if words == ["apply", "--filename=-"]:
  text = sys.stdin.read()
  (cloud / "manifest.yaml").write_text(text)
  spec = yaml.safe_load(text)["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  [rule], [container] = job["podFailurePolicy"]["rules"], job["template"]["spec"]["containers"]
  assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
  for start in range(spec["failurePolicy"]["maxRestarts"] + 1):
    codes = []
    for index in range(job["completions"]):
      env = {{e["name"]: e.get("value", str(index)) for e in container.get("env", [])}}
      env = {{"MRMAE_PROCESS_ID": str(index)}} | env
      expanded = [re.sub(r"\\$\\$", "$", word) for word in container["args"]]
      command = ["python", "-m", "mrmae_jax", *expanded]
      codes.append(subprocess.call(command, env=os.environ | env))
    if not any(codes) or set(codes) & set(rule["onExitCodes"]["values"]): break
  print("ended with", max(codes))
""",
}


class Cloud:
  """The stand-ins in a folder, and what they have noted."""

  def __init__(self, folder):
    self.folder, home = folder, folder / "home"
    (folder / "bin").mkdir()
    home.mkdir()
    for name, text in (STAND_INS | {"python": PAYLOAD}).items():
      (folder / "bin" / name).write_text(text)
      (folder / "bin" / name).chmod(0o755)
    clean = {
      key: value
      for key, value in os.environ.items()
      if not key.startswith(("SLURM_", "TPU_", "JOB_", "MRMAE_", "CLOUDSDK", "CUDA_"))
    }
    self.env = clean | {
      "CLOUD": str(folder),
      "HOME": str(home),
      "PATH": f"{folder}/bin:{os.environ['PATH']}",
    }

  def start(self, script, *words, **env):
    """A script of launch/, or another program by its absolute path, as typed in the repository."""
    program = [script] if os.path.isabs(script) else ["bash", f"launch/{script}"]
    return subprocess.Popen(
      [*program, *words],
      cwd=ROOT,
      env=self.env | env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, script, *words, **env):
    """(exit code, output, errors)"""
    process = self.start(script, *words, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def plan(self, **plans):
    for host, words in plans.items():
      (self.folder / f"plan-{host.removeprefix('host')}").write_text(words)

  @property
  def calls(self):
    file = self.folder / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

  def wait_for_calls(self, count):
    end = time.monotonic() + 30
    while len(self.calls) < count:
      assert time.monotonic() < end, self.calls
      time.sleep(0.05)

  @property
  def log(self):
    return (self.folder / "log").read_text() if (self.folder / "log").exists() else ""


@pytest.fixture
def cloud(tmp_path):
  cloud = Cloud(tmp_path)
  yield cloud
  for home in (
    tmp_path / "home",
    *(tmp_path / "hosts").glob("*"),
  ):  # whatever a failed test has left running
    pid = home / ".mrmae_jax" / "pid"
    if pid.exists():
      try:
        os.killpg(int(pid.read_text()), signal.SIGKILL)
      except (ProcessLookupError, ValueError):
        pass


POD = dict(TPU_NAME="pod", TPU_ZONE="here-1a", TPU_TYPE="v6e-16")
BUCKET = "--workdir=gs://bucket/run 1"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_say_how_they_are_used(script):
  subprocess.run(["bash", "-n", script], check=True)
  if shutil.which("shellcheck"):
    subprocess.run(
      ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", script], check=True, cwd=ROOT
    )
  text = script.read_text()
  if script.name not in ("common.sh", "slurm_task.sh"):
    assert (
      len(re.findall(r"^#   \S", text, re.M)) >= 3 and "--dry-run" in text
    )  # the three lines that a user types
  assert all(len(line) <= 128 for line in text.splitlines())


# A TPU slice


def test_a_dry_run_prints_commands_that_can_be_typed(cloud):
  code, out, err = cloud.run(
    "tpu_pod.sh", "run", "--dry-run", *AWKWARD, BUCKET, TPU_SPOT="1", TPU_PROJECT="mine", **POD
  )
  assert (code, err, cloud.log) == (0, "", "")
  describe, create, probe, tar, scp, setup, run = [
    shlex.split(line) if "$'" not in line else line for line in out.splitlines()
  ]
  common = ["--zone=here-1a", "--project=mine"]
  assert (
    describe[:6] == ["gcloud", "compute", "tpus", "queued-resources", "describe", "pod"]
    and describe[-2:] == common
  )
  assert create[3:] == [
    "queued-resources",
    "create",
    "pod",
    "--node-id=pod",
    "--accelerator-type=v6e-16",
    "--runtime-version=v2-alpha-tpuv6e",
    "--spot",
    "--async",
    *common,
  ]
  assert (
    tar[0] == "tar"
    and scp[3:5] == ["tpu-vm", "scp"]
    and scp[-4:] == ["pod:", "--worker=all", *common]
  )
  assert "host.sh setup tpu,gcs" in setup and probe[3:5] == run[3:5] == ["tpu-vm", "ssh"]
  remote = next(word for word in run if word.startswith("--command=")).removeprefix("--command=")
  assert shlex.split(remote) == [
    "bash",
    "mrmae_jax/launch/host.sh",
    "run",
    *AWKWARD,
    BUCKET,
    "--multihost",
  ]


def test_a_slice_from_nothing_to_the_end_of_the_training(cloud):
  code, out, err = cloud.run("tpu_pod.sh", "run", *AWKWARD, BUCKET, **POD)
  assert code == 0 and "training 0" in out and "waiting for v6e-16 in here-1a" in err
  assert [call["host"] for call in sorted(cloud.calls, key=lambda call: call["host"])] == ["0", "1"]
  for call in cloud.calls:  # through two shells and back
    assert call["words"] == ["-m", "mrmae_jax", "pretrain", *AWKWARD, BUCKET, "--multihost"]
  assert (
    "--spot" not in cloud.log
    and cloud.log.count(" create ") == 1
    and cloud.log.count("uv venv --python 3.11") == 2
  )
  install = re.search(r"uv pip install .*", cloud.log)[0]
  assert install.endswith("/hosts/0/mrmae_jax[tpu,gcs]") or install.endswith(
    "/hosts/1/mrmae_jax[tpu,gcs]"
  )
  assert (
    "--constraint" in install
    and (cloud.folder / "hosts" / "1" / "mrmae_jax" / "configs" / "mrmae.py").is_file()
  )
  assert cloud.run("tpu_pod.sh", "run", *AWKWARD, BUCKET, **POD)[0] == 0  # what is there is used
  assert (
    cloud.log.count(" create ") == 1 and cloud.log.count("uv venv") == 2 and len(cloud.calls) == 4
  )
  code, out, _ = cloud.run("tpu_pod.sh", "logs", "1", **POD)
  assert code == 0 and out.count("training 0") == 2
  code, out, _ = cloud.run("tpu_pod.sh", "status", **POD)
  assert code == 0 and out.count("ended with exit code 0: pretrain --config=") == 2
  assert cloud.run("tpu_pod.sh", "delete", **POD)[0] == 0 and not (cloud.folder / "slice").exists()
  code, _, err = cloud.run("tpu_pod.sh", "delete", **POD)
  assert code == 0 and "there is no pod in here-1a" in err


def test_a_preempted_slice_is_replaced_and_the_training_continues(cloud):
  cloud.plan(host0="preempt 0", host1="preempt 0")
  options = dict(TPU_SPOT="1", TPU_CREATE_FLAGS="--network=n --tags=a")
  code, _, err = cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **options, **POD)
  assert code == 0, err
  assert "the slice was preempted; asking for another" in err and len(cloud.calls) == 4
  assert (
    cloud.log.count("--spot --network=n --tags=a --async") == 2 and cloud.log.count(" delete ") == 1
  )
  assert (
    cloud.log.count("uv venv") == 4 and len({tuple(call["words"]) for call in cloud.calls}) == 1
  )


def test_hosts_start_again_by_themselves_unless_the_end_is_final(cloud):
  cloud.plan(host0="134 75 0", host1="134 75 0")
  code, out, _ = cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  assert (
    code == 0
    and len(cloud.calls) == 6
    and "exit code 134: starting again from the newest checkpoint" in out
  )
  cloud.plan(host0="1 1 1 0", host1="0")
  code, out, _ = cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  assert (
    code == 1
    and len(cloud.calls) == 10
    and "exit code 1, 3 times in a row within 10 minutes of starting" in out
  )
  for final in (2, 3, 4):
    cloud.plan(host0=str(final), host1=str(final))
    before = len(cloud.calls)
    assert (
      cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)[0] == final
      and len(cloud.calls) == before + 2
    )
  assert cloud.log.count(" create ") == 1


def test_a_lost_connection_is_taken_up_again(cloud):
  cloud.plan(host0="slow 9", host1="slow 9")
  (cloud.folder / "lose connection").touch()
  code, out, err = cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  assert (
    code == 0
    and "lost the hosts (exit code 255, slice READY); continuing" in err
    and "training slow" in out
  )
  assert (
    len(cloud.calls) == 2
    and cloud.log.count("uv venv") == 2
    and not (cloud.folder / "lose connection").exists()
  )


def test_the_training_outlives_the_terminal_and_can_be_stopped(cloud):
  cloud.plan(host0="hang", host1="hang")
  process = cloud.start("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  cloud.wait_for_calls(2)
  process.kill()
  process.stdout.close(), process.stderr.close(), process.wait()
  code, out, _ = cloud.run("tpu_pod.sh", "status", **POD)
  assert code == 0 and out.count("running: pretrain --config=a.py") == 2
  code, _, err = cloud.run("tpu_pod.sh", "setup", **POD)
  assert code == 2  # not under a running training
  code, _, err = cloud.run("tpu_pod.sh", "run", "--config=b.py", BUCKET, **POD)
  assert code == 2 and "another run is under way here: pretrain --config=a.py" in err
  again = cloud.start("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  out = ""
  while out.count("training hang") < 2:  # attached to both hosts
    line = again.stdout.readline()
    assert line, out
    out += line
  assert again.poll() is None and cloud.run("tpu_pod.sh", "stop", **POD)[0] == 0
  rest, _ = again.communicate(timeout=60)
  assert (
    again.returncode == 75 and (out + rest).count("training hang") == 2 and len(cloud.calls) == 2
  )


@pytest.mark.parametrize(
  "words, env, message",
  [
    (["run", "--config=a.py"], {}, "run needs --workdir=gs://BUCKET/FOLDER, not ''"),
    (
      ["run", "--config=a.py", "--workdir=/tmp/x"],
      {},
      "run needs --workdir=gs://BUCKET/FOLDER, not '/tmp/x'",
    ),
    (["create"], {"TPU_ZONE": ""}, "TPU_ZONE is not set, e.g. export TPU_NAME="),
    (["create"], {"TPU_TYPE": "v9-8"}, "TPU_TYPE=v9-8 is not one of v2-N"),
    (["crate"], {}, "crate is not one of create, setup, run"),
  ],
)
def test_mistakes_are_answered_before_anything_is_asked_for(cloud, words, env, message):
  code, out, err = cloud.run("tpu_pod.sh", *words, **(POD | env))
  assert (
    code == 2
    and err.startswith(f"error: {message}")
    and err.count("\n") == 1
    and (out, cloud.log) == ("", "")
  )


def test_other_failures_of_gcloud_are_not_taken_for_an_absent_slice(cloud):
  gcloud = cloud.folder / "bin" / "gcloud"
  gcloud.write_text(
    "#!/bin/sh\necho 'ERROR: PERMISSION_DENIED' >&2\necho $* >> $CLOUD/log\nexit 1\n"
  )
  code, _, err = cloud.run("tpu_pod.sh", "run", "--config=a.py", BUCKET, **POD)
  assert code == 1 and "PERMISSION_DENIED" in err and " create " not in cloud.log
  gcloud.write_text("#!/bin/sh\necho FAILED\n")
  code, _, err = cloud.run("tpu_pod.sh", "create", **POD)
  assert code == 2 and "error: the request for v6e-16 in here-1a failed" in err


# A GPU host


def test_gpu_host(cloud):
  code, _, err = cloud.run("gpu_host.sh", "run", "--config=a.py")
  assert code == 2 and "there is no Python environment" in err
  assert cloud.run("gpu_host.sh", "setup")[0] == 0 and f"--editable {ROOT}[cuda13]\n" in cloud.log
  assert (
    cloud.run("gpu_host.sh", "setup", "cuda13,gcs")[0] == 0
    and f"--editable {ROOT}[cuda13,gcs]\n" in cloud.log
  )
  code, out, _ = cloud.run("gpu_host.sh", "--dry-run", "run", *AWKWARD)
  assert code == 0 and shlex.split(out)[-len(AWKWARD) :] == AWKWARD and not cloud.calls
  assert not (cloud.folder / "home" / ".mrmae_jax" / "train.log").exists()
  cloud.plan(home="9 0")
  code, out, _ = cloud.run("gpu_host.sh", "run", *AWKWARD)
  assert code == 0 and [call["words"] for call in cloud.calls] == 2 * [
    ["-m", "mrmae_jax", "pretrain", *AWKWARD]
  ]
  assert out == "training 9\nexit code 9: starting again from the newest checkpoint\ntraining 0\n"
  assert cloud.run("gpu_host.sh", "status")[1].startswith(
    "ended with exit code 0: pretrain --config=configs/mrmae.py:base"
  )
  assert cloud.run("gpu_host.sh", "logs")[1] == out
  code, _, err = cloud.run("gpu_host.sh", "stop")
  assert code == 0 and "nothing runs here" in err
  cloud.plan(home="3 0")
  assert cloud.run("gpu_host.sh", "run", "--config=a.py")[0] == 3 and len(cloud.calls) == 3
  assert cloud.run("gpu_host.sh", "run", "finetune", "--config=a.py")[0] == 0
  assert cloud.calls[-1]["words"] == ["-m", "mrmae_jax", "finetune", "--config=a.py"]


# Slurm


def test_slurm_starts_one_task_per_gpu_and_keeps_the_words(cloud):
  code, out, err = cloud.run(
    f"{cloud.folder}/bin/sbatch", "launch/slurm.sbatch", *AWKWARD, tasks="3"
  )
  assert (code, out.splitlines()[-1]) == (0, "0"), err
  assert sorted(call["host"] for call in cloud.calls) == ["0", "1", "2"]
  for call in cloud.calls:
    assert (
      call["words"] == ["-m", "mrmae_jax", "pretrain", *AWKWARD, "--multihost"]
      and "JAX_LOCAL_DEVICE_IDS" not in call["env"]
    )
  cloud.run(
    f"{cloud.folder}/bin/sbatch", "launch/slurm.sbatch", "--config=a.py", tasks="1"
  )  # one task on a node of eight GPUs
  assert cloud.calls[-1]["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
  code, out, _ = cloud.run("slurm.sbatch", "--dry-run", "--config=a b.py")
  command = "srun --kill-on-bad-exit=1 bash launch/slurm_task.sh --config=a\\ b.py\n"
  assert code == 0 and out == command
  cloud.run(f"{cloud.folder}/bin/sbatch", "launch/slurm.sbatch", "probe", "--config=a.py")
  assert cloud.calls[-1]["words"] == ["-m", "mrmae_jax", "probe", "--config=a.py", "--multihost"]
  assert "requeue" not in cloud.log


@pytest.mark.parametrize(
  "plans, code, starts",
  [
    (dict(host0="3", host1="137"), "3", 1),  # bad data on one, the other killed by srun: not again
    (dict(host0="75 0", host1="75 0"), "0", 2),  # saved before a preemption
    (dict(host0="137 134 0", host1="134 137 0"), "0", 3),  # killed, aborted
    (dict(host0="1 " * 9, host1="0 " * 9), "1", 4),
  ],
)  # broken
def test_slurm_puts_back_what_was_interrupted(cloud, plans, code, starts):
  cloud.plan(**plans)
  _, out, _ = cloud.run(f"{cloud.folder}/bin/sbatch", "launch/slurm.sbatch", "--config=a.py")
  assert (
    out.splitlines()[-1] == code
    and len(cloud.calls) == 2 * starts
    and cloud.log.count("requeue 7") == starts - 1
  )


@pytest.mark.parametrize("state, starts", [("RUNNING", 2), ("CANCELLED", 1)])
def test_slurm_passes_the_signal_on(cloud, state, starts):
  cloud.plan(host0="hang 0", host1="hang 0")
  process = cloud.start(
    f"{cloud.folder}/bin/sbatch", "launch/slurm.sbatch", "--config=a.py", job_state=state
  )
  cloud.wait_for_calls(2)
  time.sleep(0.3)
  os.kill(
    int((cloud.folder / "batch").read_text()), signal.SIGTERM
  )  # the shell alone, as --signal=B:TERM
  out, _ = process.communicate(timeout=30)
  assert len(cloud.calls) == 2 * starts and out.splitlines()[-1] == ("0" if starts == 2 else "75")


def test_a_sweep_as_an_array_of_jobs(cloud, monkeypatch):
  from mrmae_jax.cli import sweep

  monkeypatch.chdir(ROOT)
  jobs = sweep.make_jobs(
    "tests/tiny_sweep.py:vit", str(cloud.folder / "a sweep"), ["--config.data.source=folder:/it's"]
  )
  for job in jobs:
    Path(job.workdir).mkdir(parents=True)
  script = cloud.folder / "array.sbatch"
  script.write_text(sweep.slurm_array(jobs, parallel=2))
  subprocess.run(["bash", "-n", script], check=True)
  assert (
    "#SBATCH --array=0-1%2" in script.read_text()
    and "#SBATCH --signal=B:TERM@120" in script.read_text()
  )
  cloud.plan(host0="134 4 0", host1="134 4 0")
  assert cloud.run(f"{cloud.folder}/bin/sbatch", str(script))[0] == 0
  starts = [tuple(call["words"][2:]) for call in cloud.calls if call["host"] == "0"]
  words = [(*job.words, "--multihost") for job in jobs]
  assert starts == [words[0], words[0], words[1]]
  assert [job.is_finished for job in jobs] == [False, True]


# Kubernetes


TPU_JOB = dict(
  JOB_NAME="run", JOB_IMAGE="here/mrmae:1", JOB_TPU="tpu-v6e-slice", JOB_TOPOLOGY="2x4"
)
GPU_JOB = dict(JOB_NAME="run", JOB_IMAGE="here/mrmae:1", JOB_GPU="nvidia-h100-80gb", JOB_HOSTS="3")


@pytest.mark.parametrize("env, hosts", [(TPU_JOB, 2), (GPU_JOB, 3)], ids=["tpu", "gpu"])
def test_jobset(cloud, env, hosts):
  words = [*AWKWARD, "--config.teacher.name=$(x)", BUCKET]
  cloud.plan(**{f"host{i}": "134 0" for i in range(hosts)})
  code, out, err = cloud.run("gke/jobset.sh", "run", *words, **env)
  assert code == 0 and out.endswith("ended with 0\n"), err
  assert len(cloud.calls) == 2 * hosts
  assert all(
    call["words"] == ["-m", "mrmae_jax", "pretrain", *words, "--multihost"] for call in cloud.calls
  )
  if env is GPU_JOB:
    assert cloud.calls[-1]["env"]["MRMAE_COORDINATOR_ADDRESS"] == "run-host-0-0.run:8476"
    assert cloud.calls[-1]["env"]["MRMAE_NUM_PROCESSES"] == "3"
  text = (cloud.folder / "manifest.yaml").read_text()
  job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  limits = pod["containers"][0]["resources"]["limits"]
  assert limits == ({"google.com/tpu": 4} if env is TPU_JOB else {"nvidia.com/gpu": 8})
  assert (
    pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
  )  # podFailurePolicy asks for the first
  assert ("2x4" in pod["nodeSelector"].values()) == (env is TPU_JOB)
  code, out, _ = cloud.run("gke/jobset.sh", "run", "--dry-run", "probe", *words, **env)
  assert code == 0 and '["probe", ' in out and '"--multihost"]' in out
  code, out, _ = cloud.run("gke/jobset.sh", "run", "--dry-run", *words, **env)
  assert code == 0 and out == f"{text}kubectl apply --filename=-\n"
  cloud.plan(host0="3", host1="0", host2="0")
  before = len(cloud.calls)
  assert cloud.run("gke/jobset.sh", "run", *words, **env)[1].endswith("ended with 3\n")
  assert len(cloud.calls) == before + hosts
  for verb, expected in (
    ("logs", "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=run,"),
    ("status", "kubectl get jobset/run\n"),
    ("delete", "kubectl delete jobset/run --ignore-not-found\n"),
  ):
    assert cloud.run("gke/jobset.sh", verb, **env)[0] == 0 and expected in cloud.log


@pytest.mark.parametrize(
  "words, env, message",
  [
    (["run", "--workdir=/x"], {}, "run needs --workdir=gs://BUCKET/FOLDER, not '/x'"),
    (["run", BUCKET], {"JOB_TOPOLOGY": ""}, "JOB_TOPOLOGY is not set"),
    (["go"], {}, "go is not one of run, logs"),
  ],
)
def test_mistakes_with_jobset(cloud, words, env, message):
  code, _, err = cloud.run("gke/jobset.sh", *words, **(TPU_JOB | env))
  assert code == 2 and err.startswith(f"error: {message}") and not cloud.log


# SkyPilot and Docker


def test_skypilot(cloud):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  assert not {0, 2, 3, 4, 137} & set(task["resources"]["job_recovery"]["recover_on_exit_codes"])
  assert cloud.run("/bin/bash", "-c", task["setup"])[0] == 0
  env = dict(
    SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    SKYPILOT_NUM_NODES="2",
    SKYPILOT_NODE_RANK="1",
    COMMAND=task["envs"]["COMMAND"],
    CONFIG=task["envs"]["CONFIG"],
    WORKDIR="gs://bucket/run",
    ARGUMENTS="--config.epochs=3 --config.data.source='folder:/my images'",
  )
  assert cloud.run("/bin/bash", "-c", task["run"], **env)[0] == 0
  call = cloud.calls[0]
  assert call["words"] == [
    "-m",
    "mrmae_jax",
    "pretrain",
    "--multihost",
    "--config=mrmae:base",
    "--workdir=gs://bucket/run",
    "--config.epochs=3",
    "--config.data.source=folder:/my images",
  ]
  assert call["env"]["MRMAE_COORDINATOR_ADDRESS"] == "10.0.0.1:8476" and call["host"] == "1"
  code, _, err = cloud.run("/bin/bash", "-c", task["run"], **(env | {"WORKDIR": "/tmp/run"}))
  assert code == 2 and "WORKDIR=/tmp/run must be gs://BUCKET/FOLDER" in err


@pytest.mark.parametrize("accelerator, extra", [("gpu", "cuda13"), ("tpu", "tpu")])
def test_dockerfiles_copy_what_is_there(accelerator, extra):
  lines = (LAUNCH / "docker" / f"Dockerfile.{accelerator}").read_text().splitlines()
  copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
  assert {"mrmae_jax", "configs", "setup.cfg", "requirements.txt"} <= set(copied)
  assert all((ROOT / name).exists() for name in copied)
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  for name in re.search(r'"\.\[(.*)\]"', "\n".join(lines))[1].split(","):
    assert name in setup["options.extras_require"]
  assert f'".[{extra},gcs]"' in "\n".join(lines)
  assert lines[-1] == 'ENTRYPOINT ["tini", "--", "python", "-m", "mrmae_jax"]'


def test_extras_are_written_as_every_pip_finds_them():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extras = set(setup["options.extras_require"])
  assert not {name for name in extras if "_" in name}  # pip before 23.3 does not find these
  for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
    for names in re.findall(r'install (?:-e )?"(?:\.|mrmae_jax)\[([\w,-]+)\]"', page.read_text()):
      assert set(names.split(",")) <= extras, page

"""What the page on clusters offers for copying: the SLURM script and the config group."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from salve_lm.cli import main
from salve_lm.configs import ROOT

SCRIPT = ROOT / "trainer" / "slurm.sbatch"
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "cluster.md"
# task 1 of 2, the one of the second node, as `srun` describes it
TASK = {
    "JOB_ID": "12345", "JOB_NAME": "salve-lm", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2",
    "NODELIST": "gpu[07-08]", "PROCID": "1", "NODEID": "1", "LOCALID": "0",
}  # fmt: skip


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_script(folder: Path, status: int) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script with a `srun` that ends with `status`; what was called, line by line."""
    program(folder, "srun", f'echo srun "$@" >> {folder}/calls; exit {status}')
    program(folder, "scontrol", f'echo scontrol "$@" >> {folder}/calls')
    done = subprocess.run(
        ["bash", str(SCRIPT), "--config", "my run.yaml"],
        env={
            **{f"SLURM_{k}": v for k, v in TASK.items()},
            "PATH": f"{folder}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    return done, (folder / "calls").read_text().splitlines()


def test_its_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_page_shows_the_script() -> None:
    assert f"```bash\n{SCRIPT.read_text()}```" in PAGE.read_text()


def test_the_command_that_it_starts(tmp_path: Path) -> None:
    done, calls = run_script(tmp_path, 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == [
        "srun --kill-on-bad-exit=1 salve-lm fit --config my run.yaml --config trainer/cluster "
        "--trainer.num_nodes 2 --trainer.devices 1 --ckpt_path last"
    ]


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (1, False), (137, False)])
def test_only_a_run_that_was_stopped_is_requeued(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    done, calls = run_script(tmp_path, status)
    assert done.returncode == status
    assert calls[1:] == (["scontrol requeue 12345"] if requeued else [])


def test_lightning_reads_the_ranks_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    # these are set below, and must not outlive the test
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in TASK.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=1, num_nodes=2, logger=False,
        enable_checkpointing=False,
    )  # fmt: skip
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    assert isinstance(environment, SLURMEnvironment)
    assert (trainer.global_rank, trainer.local_rank, trainer.node_rank) == (1, 0, 1)
    assert trainer.world_size == 2
    assert (environment.main_address, environment.main_port) == ("gpu07", 15000 + 2345)
    with pytest.raises(ValueError, match="num_nodes=2"):
        environment.validate_settings(num_devices=1, num_nodes=1)


def test_the_config_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=demo/2_autoencoder", "--config=trainer/cluster", "--print_config"])
    strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.DDPStrategy"
    assert strategy["init_args"]["timeout"] == "0:10:00"


@pytest.mark.parametrize(
    "command", [["report", "nowhere"], ["compare", "--base=a", "--others=[b]", "--out=c"]]
)
def test_work_for_one_is_done_by_one(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="error: "):
        main(command)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    main(command)

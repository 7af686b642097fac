"""The command line: a LightningCLI with subcommands of our own."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from salve_lm.configs import named_configs
from salve_lm.edits.spec import EditSpec
from salve_lm.errors import OutputExists, SalveError
from salve_lm.fault_tolerance.checkpoint_io import AtomicCheckpointIO
from salve_lm.fault_tolerance.lost_rank import end_children, lost_rank
from salve_lm.option_hints import hint
from salve_lm.trainer import SalveTrainer

# subcommand -> which of the trainer, model and data option groups it takes
OWN = {
    "discover": "td",
    "sweep": "tmd",
    "robustness": "tmd",
    "select_layers": "tm",
    "inject": "tmd",
    "measure": "tmd",
    "edit": "tmd",
    "compare": "",
    "report": "",
}
# they take `source` or `saes` in place of a model
MODEL_OPTIONAL = ("edit", "robustness")
# what one process does: of several that torchrun or srun started, the others have nothing to do
ALONE = ("sweep", "edit", "compare", "report")
DEBUG_VARIABLE = "SALVE_LM_DEBUG"
PARSER_OPTIONS = {"default_env": True, "env_prefix": "SALVE_LM"}
DESCRIPTION = (
    "Find, verify and permanently edit the features of trained networks. A --config is a file, or "
    "the name of a shipped one such as demo/1_backbone. The options of a model, data or edit class "
    "are shown by, for example, `salve-lm fit --model.help vision.Classifier`."
)


class SaveRunConfig(SaveConfigCallback):
    """Saves `config.yaml` with the run, but never into the working directory."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, if the run has a folder of its own."""
        if trainer.loggers or trainer.default_root_dir != os.getcwd():
            super().setup(trainer, pl_module, stage)


class OneLineParser(LightningArgumentParser):
    """Says what is wrong without the list of all options before it; `--help` has that."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As the base class, with the nearest value where an option has a fixed set of them."""
        super().error(message + hint(message), ex)


class SalveCLI(LightningCLI):
    """`fit`, `validate`, `test`, `predict` of Lightning, and the subcommands of `SalveTrainer`."""

    def __init__(self, args: list[str]) -> None:
        # Building the parser of every subcommand takes seconds; only the one asked for is built.
        self._asked = next((a for a in args if a in self.subcommands()), None)
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=SalveTrainer,
            parser_class=OneLineParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={**PARSER_OPTIONS, "prog": "salve-lm", "description": DESCRIPTION},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommand -> arguments of its method that come from `--model` and `--data`."""
        return {
            **LightningCLI.subcommands(),
            **{name: {"model", "datamodule"} for name in OWN},
            "report": {"run"},
        }

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        kwargs = {**PARSER_OPTIONS, **kwargs}
        if self._asked not in (None, subcommand):
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        self._groups = OWN.get(subcommand, "tmd")
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "report":
            parser.add_argument("run", type=str, help="The run folder.")
            self._subcommand_method_arguments[subcommand] = ["run"]
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give every subcommand that computes something a seed."""
        if self._groups:
            super().add_default_arguments_to_parser(parser)

    def _set_seed(self) -> None:
        if self._groups:
            super()._set_seed()

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give each subcommand the option groups it uses and no others."""
        if "t" in self._groups:
            parser.add_lightning_class_args(SalveTrainer, "trainer")
        if "m" in self._groups:
            parser.add_lightning_class_args(
                LightningModule,
                "model",
                subclass_mode=True,
                required=self._asked not in MODEL_OPTIONAL,
            )
        if "d" in self._groups:
            parser.add_lightning_class_args(
                LightningDataModule, "data", subclass_mode=True, required=False
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse `args` (Lightning's own version warns when a program passes them)."""
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; checkpoints are written whole or not at all."""
        config = dict(self._get(self.config_init, "trainer", default={}))
        if not config:
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            return SalveTrainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(p, CheckpointIO) for p in plugins):
            plugins.append(AtomicCheckpointIO())
        return super().instantiate_trainer(**{**kwargs, "plugins": plugins})

    def before_fit(self) -> None:
        """Refuse to overwrite a finished run, before a logger deletes its files."""
        if self._get(self.config, "ckpt_path"):
            return  # resumes what is there
        out = getattr(self.model, "hparams", {}).get("out")
        if out is not None and Path(out).exists():
            raise OutputExists(out)
        for callback in self.trainer.checkpoint_callbacks:
            folder = getattr(callback, "dirpath", None)
            found = sorted(Path(folder).glob("*.ckpt")) if folder is not None else []
            if found:
                raise OutputExists(
                    found[0], "Remove it, choose another dirpath, or resume with --ckpt_path last."
                )

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand in ALONE and getattr(rank_zero_only, "rank", False):
            return
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as e:
            lost = lost_rank(e)
            if lost is None:
                raise
            end_children(self.trainer)
            raise lost from e
        # a comparison is no run: its record says what was compared
        out = self._get(self.config, "out") if OWN.get(subcommand) else None
        if out is not None and self.trainer.is_global_zero:
            # what `fit` and `validate` leave in their own folder; the report repeats runs from it
            # (`inject` may go on in a folder of its own)
            self._parser(subcommand).save(
                self.config[subcommand], Path(out) / "config.yaml", multifile=False,
                skip_none=False, overwrite=True,
            )  # fmt: skip

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs["model"] is None:
            del kwargs["model"]
        return kwargs


def main(args: list[str] | None = None) -> None:
    """Run the command line `args`, `sys.argv[1:]` by default.

    A `SalveError`, and Lightning's own complaint about a configuration, ends the process with
    status 1 and its message alone; `SALVE_LM_DEBUG=1` shows the traceback.
    """
    set_parsing_settings(subclasses_enabled=[EditSpec])
    _quieten()
    given = sys.argv[1:] if args is None else list(args)
    try:
        if given[:1] == ["completion"]:
            from salve_lm.completion import completion_script

            sys.stdout.write(completion_script(given[1:]))
            return
        SalveCLI(named_configs(given))
    except Exception as e:
        mine = _for_the_user(e)
        if mine is None or os.environ.get(DEBUG_VARIABLE):
            raise
        missing = ("Accelerator` can not run", "backend found")
        cure = " Use --trainer.accelerator auto." if any(m in str(mine) for m in missing) else ""
        raise SystemExit(f"error: {mine}{cure}") from None


def _for_the_user(e: BaseException | None) -> BaseException | None:
    """The error that names a cure: `e`, or the one that jsonargparse wrapped in it."""
    while e is not None and not isinstance(e, SalveError | MisconfigurationException):
        e = e.__cause__
    return e


def _quieten() -> None:
    """Drop Lightning's advertisements, and warnings that no user can or need act on."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*`tensorboardX` has been removed.*")
    # harvesting keeps what `predict` would return; the folder holds the run's own config.yaml
    warnings.filterwarnings("ignore", message="predict returned None.*")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "💡" not in record.getMessage())

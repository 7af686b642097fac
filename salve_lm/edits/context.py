"""The SAEs, feature tables and task vectors that edits name by path, each loaded once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salve_lm.errors import BadConfig, UnsupportedEdit
from salve_lm.features import FeatureTable, check_latent
from salve_lm.hashing import hash_file, hash_tensors
from salve_lm.task_vectors.sources import TaskVectorSource, open_source

if TYPE_CHECKING:
    from sae_lens import SAE
    from transformers import PreTrainedConfig


class EditContext:
    """A small cache, and the defaults for specs that name no SAE or feature table.

    Args:
        sae: SAE folder for specs without one.
        features: feature-table folder for specs without one.
    """

    def __init__(self, sae: str | Path | None = None, features: str | Path | None = None) -> None:
        self._default_sae, self._default_features = sae, features
        self._saes: dict[str, SaeView] = {}
        self._tables: dict[str, FeatureTable] = {}
        self._solved: dict[tuple[str, int, float], Tensor] = {}
        self._sources: dict[tuple[str, str | None, bool], TaskVectorSource] = {}
        self._checked: set[tuple[str, bool]] = set()

    def has_features(self, path: str | None) -> bool:
        """Whether a feature table is named, in the spec or by default."""
        return path is not None or self._default_features is not None

    def sae(self, path: str | None) -> SaeView:
        """The SAE in folder `path` (or of the public release it names), or the default one.

        Raises:
            BadConfig: none is named.
            SalveError: see `salve_lm.sae.pretrained.open_sae`.
        """
        key = self.sae_path(path)
        if key not in self._saes:
            from salve_lm.sae import hash_sae
            from salve_lm.sae.pretrained import is_release, open_sae

            sae = open_sae(key)
            sha256 = hash_tensors(sae.state_dict()) if is_release(key) else hash_sae(key)
            self._saes[key] = SaeView(key, sae, sha256)
        return self._saes[key]

    def sae_path(self, path: str | None) -> str:
        """The SAE that `path`, or the default, names.

        Raises:
            BadConfig: none is named.
        """
        where = path if path is not None else self._default_sae
        if where is None:
            raise BadConfig("This edit needs an SAE: set its `sae` to the folder of a trained one.")
        return str(where)

    def table(self, path: str | None, sae: SaeView | None = None) -> FeatureTable:
        """The feature table in folder `path`, or the default one, checked to belong to `sae`.

        Raises:
            BadConfig: none is named.
            StaleStore: it was made with another SAE.
            SalveError: see `FeatureTable.load`.
        """
        key = self.table_path(path)
        if key not in self._tables:
            self._tables[key] = FeatureTable.load(key)
        table = self._tables[key]
        if sae is not None:
            table.check_sae(sae.sha256, sae.path)
        return table

    def table_path(self, path: str | None) -> str:
        """The folder of the table that `path`, or the default, names."""
        where = path if path is not None else self._default_features
        if where is None:
            raise BadConfig(
                "This edit needs class statistics: set its `features` to a folder that "
                "`salve-lm discover` wrote."
            )
        return str(where)

    def sources(self, sae: str | None, features: str | None) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of the SAE and the table a spec names (or its defaults), if loaded."""
        found = {}
        key = str(sae if sae is not None else self._default_sae)
        if key in self._saes:
            found["sae"] = {"path": key, "sha256": self._saes[key].sha256}
        key = str(features if features is not None else self._default_features)
        if key in self._tables:
            sha256 = hash_file(Path(key) / "features.safetensors")
            found["features"] = {"path": key, "sha256": sha256}
        return found

    def saes_like(self, pattern: str | None) -> list[dict[str, str]]:
        """Path and SHA-256 of the SAEs that `pattern`, or the default, names and that are loaded.

        `{layer}` in it stands for any number.
        """
        named = re.escape(self.sae_path(pattern)).replace(re.escape("{layer}"), r"\d+")
        loaded = [sae for path, sae in self._saes.items() if re.fullmatch(named, path)]
        return [{"path": sae.path, "sha256": sae.sha256} for sae in loaded]

    def task_vector(
        self,
        finetuned: str,
        base: str | None = None,
        *,
        config: PreTrainedConfig | None = None,
        model_type: str | None = None,
        other_base: bool = False,
    ) -> TaskVectorSource:
        """The task vector of `finetuned`, opened once; see `open_source`.

        `model_type` stands in for a `config` that is not at hand.
        """
        key = finetuned, base, other_base
        if key not in self._sources:
            if config is None and model_type is not None:
                from transformers import AutoConfig

                config = AutoConfig.for_model(model_type)
            self._sources[key] = open_source(finetuned, base, config, other_base=other_base)
        return self._sources[key]

    def check_selection(self, path: str, model: nn.Module) -> None:
        """Refuse, once, a layer selection that was made for another model than `model`.

        Raises:
            StaleStore: says what differs.
        """
        from salve_lm.specificity.selection_file import check_model_file

        # a model without values is checked by its shape alone, and once more where it has them
        key = path, any(p.is_meta for p in model.parameters())
        if key not in self._checked:  # hashing the weights takes seconds where they are large
            check_model_file(path, model)
            self._checked.add(key)

    def whitened_mean(self, path: str | None, k: int, ridge: float) -> Tensor:
        """C^-1 m_k, float64 [d_in], for the table's second moment C and class mean m_k.

        C gets `ridge` times its mean diagonal added, so that dead channels do not make it
        singular. Kept, because the solution costs d_in^3 and an edit is resolved at every
        validation.
        """
        key = (self.table_path(path), k, ridge)
        if key not in self._solved:
            table = self.table(path)
            moment = table.x_second_moment
            moment = moment + ridge * moment.diagonal().mean() * torch.eye(table.d_in).double()
            self._solved[key] = torch.linalg.solve(moment, table.x_mean[k])
        return self._solved[key]


class SaeView:
    """The parts of a SAELens SAE that edits read, in float64 where they are computed with.

    `load_sae` has made sure that they are finite.
    """

    def __init__(self, path: str, sae: SAE, sha256: str) -> None:
        self.path, self.sha256 = path, sha256
        self._W_dec = sae.W_dec.detach().cpu()
        self._W_enc: Tensor | None = sae.W_enc.detach().cpu() if hasattr(sae, "W_enc") else None
        self.cfg = sae.cfg
        self.normalization = str(getattr(sae.cfg, "normalize_activations", "none"))

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self._W_dec.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self._W_dec.shape[1]

    def decoder(self, latents: Tensor | None = None) -> Tensor:
        """Decoder rows W_dec[latents], float64 [n, d_in]; all of them where None."""
        return (self._W_dec if latents is None else self._W_dec[latents]).double()

    def decoder_row(self, latent: int) -> Tensor:
        """One decoder row, float64 [d_in].

        Raises:
            NameNotFound: there is no such latent.
            UnsupportedEdit: the row is zero, so the latent writes nothing.
        """
        check_latent(latent, self.d_sae)
        row = self.decoder(torch.tensor([latent]))[0]
        if not row.any():
            raise UnsupportedEdit(
                f"Latent {latent} of {self.path} has a zero decoder row: it is dead and there is "
                "nothing to edit. Choose another feature."
            )
        return row

    def encoder(self, latents: Tensor | None = None) -> Tensor:
        """Encoder columns W_enc[:, latents], float64 [d_in, n]; all of them where None.

        Raises:
            UnsupportedEdit: the SAE's encoder is not linear in x up to its activation function.
        """
        if self._W_enc is None or self.normalization not in ("none", "None"):
            raise UnsupportedEdit(
                f"The encoder of {self.path} is not linear in its input (normalisation "
                f"{self.normalization!r}). Fold the normalisation in, or use an edit that reads "
                "the decoder only."
            )
        return (self._W_enc if latents is None else self._W_enc[:, latents]).double()

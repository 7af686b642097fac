"""Weight edits: specs (what), plans (which ops on which tensors) and their pure application."""

from salve_lm.edits.class_bias import LowerClassBias
from salve_lm.edits.class_row import ShrinkClassRow
from salve_lm.edits.context import EditContext
from salve_lm.edits.decoder_guided import DecoderGuided
from salve_lm.edits.directional_ablation import DirectionalAblation
from salve_lm.edits.discriminant_erasure import DiscriminantErasure
from salve_lm.edits.latent_contrast import LatentContrastErasure
from salve_lm.edits.plan import Applied, NamedOps, TensorChange, apply, apply_named
from salve_lm.edits.rank_one_head import RankOneHead
from salve_lm.edits.residual_ablation import ResidualAblation
from salve_lm.edits.residual_scaling import ResidualScaling
from salve_lm.edits.resolve import EditPlan, PlainModel, plan_edit, plan_edits
from salve_lm.edits.spec import EditSpec
from salve_lm.edits.steering import Steering
from salve_lm.edits.task_vector import TaskVectorInjection

__all__ = [
    "Applied",
    "DecoderGuided",
    "DirectionalAblation",
    "DiscriminantErasure",
    "EditContext",
    "EditPlan",
    "EditSpec",
    "LatentContrastErasure",
    "LowerClassBias",
    "NamedOps",
    "PlainModel",
    "RankOneHead",
    "ResidualAblation",
    "ResidualScaling",
    "ShrinkClassRow",
    "Steering",
    "TaskVectorInjection",
    "TensorChange",
    "apply",
    "apply_named",
    "plan_edit",
    "plan_edits",
]

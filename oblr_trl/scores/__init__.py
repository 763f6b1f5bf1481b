"""Per-sequence policy scores from one pass: sketches, exact norms, and the slow reference. Needs torch alone."""

from oblr_trl.scores.factors import DenseGradient, DenseRows, IndexRows, OuterProduct
from oblr_trl.scores.one_pass import ScoreOutput
from oblr_trl.scores.reference import reference_scores
from oblr_trl.scores.rules import register_score_rule
from oblr_trl.scores.score_pass import ScorePass
from oblr_trl.scores.sketching import score_sketches

__all__ = [
    "DenseGradient",
    "DenseRows",
    "IndexRows",
    "OuterProduct",
    "ScoreOutput",
    "ScorePass",
    "reference_scores",
    "register_score_rule",
    "score_sketches",
]

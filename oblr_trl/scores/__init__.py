r"""Per-sequence policy scores from one pass: sketches, exact norms, and the slow reference. Needs torch alone.

The score of completion i is \\( s_i = \nabla_\theta \sum_t c_{i,t} \log \pi_\theta(o_{i,t}) \\). The scope says which parameters
theta stands for, the method what is kept of s_i; any scope goes with either method, or with both in one pass.

| scope | theta | passes over a micro-batch | activations held |
|---|---|---|---|
| `"auto"` | trainable parameters of all layers that have a rule; if there are none, as `"lm_head"` | as `"all"` | as `"all"` |
| `"all"` | every trainable parameter; one without a rule is an error | forward, and backward to activations alone | those of training |
| `"last_k"` | trainable parameters of the last k blocks and of all above | forward, and backward through k blocks | of k blocks |
| `"lm_head"` | output projection, trainable or not | forward | none |

| method | result | arithmetic for a matrix (R x C), T positions | memory for it |
|---|---|---|---|
| `"sketch"` | z_i, `(B, k)`: E<z_i, z_j> = <s_i, s_j> | T (R r + C c + r c) with r c <= k | B x 2k for all; bases shared by shape |
| `"exact"` | ||s_i||^2, `(B,)` | T^2 (R + C), or T R C where that is less | B x T x T, or B x R x C; a copy of the head |

For both the output projection takes one further sweep of its logits by tiles (`head.py`). Who calls the pass ([`ScorePass`]): the
trainer by `scoring_model.py`, anybody else by [`score_sketches`]; [`reference_scores`] is the oracle. Below it lie `scopes` (which
parameters, by what `coverage` says of each), `taps` (hooks, which show a rule the `calls` of a layer), `rules` and `experts` (a layer's
gradient in `factors`), `logits` and `head` (the output projection), and one module for each method: `projections` and
`exact_norms`.
"""

from oblr_trl.scores.factors import DenseGradient, IndexRows, OuterProduct
from oblr_trl.scores.reference import reference_scores
from oblr_trl.scores.rules import register_score_rule
from oblr_trl.scores.score_pass import ScoreOutput, ScorePass
from oblr_trl.scores.sketching import score_sketches

__all__ = [
    "DenseGradient",
    "IndexRows",
    "OuterProduct",
    "ScoreOutput",
    "ScorePass",
    "reference_scores",
    "register_score_rule",
    "score_sketches",
]

"""How trainers write EAGLE-3 drafts, and what each of them means by what it writes."""

from harness.conventions import AFTER, BEFORE, DEFAULT
from suites.formats.rows import (
    ANY,
    ARCH,
    ASCENDING,
    BIASES,
    DROPPED,
    FIXED,
    FLAGS,
    KIND,
    LATENT,
    LAYERS,
    LEGACY,
    LOUD,
    MIDLAYER,
    MLA,
    NEEDED,
    NESTED,
    NO_HEAD_SIZE,
    NO_T2D,
    NOISE,
    ONCE,
    ONE,
    ONES,
    OWN,
    QWEN3,
    READ,
    REFUSED,
    SILENT,
    TARGETS,
    TOP,
    UNREAD,
    VOCAB_MAP,
    WARNS,
    YARN_MLA,
    ZEROS,
    Row,
    names,
    read,
    tensors,
    unread,
)

_CNETS = "eagle/model/cnets.py"
SAFEAILAB = (
    Row("architecture", ARCH, "LlamaForCausalLM", ANY, SILENT, "eagle/model/ea_model.py"),
    Row("layout", KIND, "", UNREAD, SILENT, _CNETS),
    Row("layer ids", "", "", DEFAULT, SILENT, "eagle/model/modeling_llama_kv.py:1138"),
    Row("order", "", "", ONCE, LOUD, "eagle/model/modeling_llama_kv.py:1138"),
    Row("aux states", "", 3, FIXED, SILENT, _CNETS),
    Row("one narrow state", "fc.weight", "", DROPPED, SILENT, _CNETS + ":639"),
    *unread(_CNETS, "use_aux_hidden_state", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_before_head"),
    *unread(_CNETS + ":714", "feedback_normed", "later_norm", "layers", "logit_scale", "tied_head", *BIASES),
    *unread(_CNETS + ":199", "head_dim"),
    *read(_CNETS + ":531", "target_hidden"),
    *names(_CNETS, MIDLAYER),
    *tensors("eagle/model/ea_model.py:76", "tensor", SILENT, DROPPED, "*"),
    *tensors(_CNETS + ":488", "missing", SILENT, TARGETS, "embed_tokens.weight"),
    *tensors("eagle/model/ea_model.py:76", "missing", SILENT, ONES, "*norm*"),
    *tensors("eagle/model/ea_model.py:76", "missing", SILENT, ZEROS, "d2t"),
    *tensors("eagle/model/ea_model.py:76", "missing", SILENT, NOISE, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, OWN, SILENT, _CNETS + ":488"),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "written", "", "traineagle3/main.py:349"),
)

_SF = "specforge/modeling/draft/llama3_eagle.py"
SPECFORGE = (
    Row("architecture", ARCH, ONE, ONE, LOUD, "specforge/modeling/auto.py"),
    Row("layout", KIND, "", UNREAD, SILENT, _SF),
    Row("layer ids", NESTED, "", AFTER, SILENT, "specforge/algorithms/model_providers.py:188-207"),
    Row("layer ids", "", "", DEFAULT, SILENT, "specforge/algorithms/model_providers.py:188-207"),
    Row("order", "", "", ASCENDING, SILENT, "specforge/offline_capture/sglang_backend/capture.py:79-108"),
    Row("aux states", "", 3, FIXED, LOUD, _SF + ":1675,1683,1763"),
    *unread(_SF, "use_aux_hidden_state", "norm_before_fc", "norm_before_residual", "later_norm", "layers"),
    *unread(_SF + ":556", "logit_scale", "tied_head", *BIASES),
    *read(_SF + ":1675", "fc_norm", "target_hidden", "head_dim"),
    Row("norm_before_head", "norm_output", True, READ, SILENT, _SF + ":1690,1773"),
    Row("feedback_normed", "", False, FIXED, SILENT, "specforge/algorithms/eagle3/model.py:396-400"),
    *names(_SF, MIDLAYER),
    *tensors("specforge/modeling/draft/base.py", "tensor", WARNS, DROPPED, "*"),
    *tensors(_SF, "missing", SILENT, TARGETS, "embed_tokens.weight"),
    *tensors(_SF, "missing", WARNS, ONES, "*norm*"),
    *tensors(_SF, "missing", WARNS, NOISE, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, OWN, SILENT, _SF),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "written", "", _SF),
)

_SPEC = "speculators/models/eagle3/core.py"
_SPEC_BODY = (
    Row("layer ids", TOP, "", BEFORE, SILENT, "speculators/models/utils.py:111"),
    Row("layer ids", "", "", DEFAULT, SILENT, "speculators/models/utils.py:111"),
    Row("order", "", "", ONCE, SILENT, "vLLM captures: models/interfaces.py:1617"),
    Row("aux states", TOP, 3, READ, LOUD, _SPEC),
    *unread(_SPEC + ":76", "use_aux_hidden_state", "norm_before_head", "later_norm", "target_hidden", "fc_bias"),
    *unread(_SPEC, "logit_scale", "tied_head"),
    *read("speculators/models/eagle3/config.py:40-90", "fc_norm", "norm_before_fc", "norm_before_residual"),
    *read("speculators/models/eagle3/config.py:82", "feedback_normed", "layers", "head_dim"),
    *read("transformers, models/llama/modeling_llama.py", "qkv_bias", "o_bias", "mlp_bias"),
    *tensors(_SPEC + ":31", "tensor", WARNS, DROPPED, "*"),
    *tensors(_SPEC, "missing", SILENT, TARGETS, "embed_tokens.weight"),
    *tensors(_SPEC + ":31", "missing", WARNS, ONES, "*norm*"),
    *tensors(_SPEC + ":31", "missing", SILENT, ZEROS, "d2t"),
    *tensors(_SPEC + ":31", "missing", WARNS, NOISE, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, OWN, SILENT, _SPEC),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "written", "", _SPEC),
)
SPECULATORS = (
    Row("architecture", ARCH, "Eagle3Speculator", "Eagle3Speculator Eagle3DraftModel", LOUD, _SPEC),
    Row("layout", KIND, "", NEEDED, LOUD, "speculators/models/eagle3/config.py"),
    *names(_SPEC, LAYERS),
    *_SPEC_BODY,
)
_CONVERTER = "speculators/convert/eagle/eagle3_converter.py"
SPECULATORS_CONVERT = (
    Row("architecture", ARCH, ONE, ANY, SILENT, _CONVERTER),
    Row("layout", KIND, "", UNREAD, SILENT, _CONVERTER),
    Row("norm_before_residual", "norm_before_residual", False, UNREAD, SILENT, _CONVERTER + ": an argument"),
    *(row for row in _SPEC_BODY if row.fact not in ("layer ids", "norm_before_residual")),
    Row("layer ids", "", "", DEFAULT, SILENT, _CONVERTER + ": an argument"),
    Row("tensor", "d2t", "", DROPPED, WARNS, _CONVERTER + ": no t2d, reduce_vocab_size false", NO_T2D),
    *names(_CONVERTER, MIDLAYER, LAYERS),
)

_MO = "modelopt/torch/speculative/plugins/hf_eagle.py"
MODELOPT = (
    Row("architecture", ARCH, ONE, ONE, LOUD, "modelopt/torch/export/plugins/hf_spec_configs.py"),
    Row("architecture", ARCH, LATENT, LATENT, LOUD, "modelopt/torch/export/plugins/hf_spec_configs.py", MLA),
    Row("layout", KIND, "", UNREAD, SILENT, _MO),
    Row("layer ids", NESTED, "", AFTER, SILENT, _MO + ":404"),
    Row("layer ids", "", "", DEFAULT, SILENT, _MO + ":404"),
    Row("order", "", "", ASCENDING, SILENT, _MO),
    Row("aux states", NESTED, 3, READ, LOUD, _MO),
    *read("modelopt/torch/export/plugins/hf_spec_configs.py", "use_aux_hidden_state", "layers", "head_dim"),
    *unread(_MO + ":783", "fc_norm", "norm_before_fc", "norm_before_residual", "norm_before_head", "later_norm"),
    *unread(_MO + ":783", "feedback_normed", "target_hidden", "logit_scale", "tied_head", *BIASES),
    *names("modelopt/torch/export/plugins/hf_spec_export.py", LAYERS),
    *tensors(_MO, "tensor", LOUD, REFUSED, "*"),
    *tensors(_MO, "missing", SILENT, TARGETS, "embed_tokens.weight", "lm_head.weight"),
    *tensors(_MO, "missing", LOUD, REFUSED, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, TARGETS, SILENT, _MO),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "never written", "", "modelopt/torch/export/plugins/hf_spec_export.py"),
)

_TS = "torchspec/models/draft"
TORCHSPEC = (
    Row("architecture", ARCH, ONE, ONE, LOUD, _TS),
    Row("architecture", ARCH, LATENT, LATENT, LOUD, _TS, MLA),
    Row("layout", KIND, "", UNREAD, SILENT, _TS),
    Row("layer ids", NESTED, "", AFTER, SILENT, "torchspec/utils/misc.py:76"),
    Row("layer ids", "", "", DEFAULT, SILENT, "torchspec/utils/misc.py:76"),
    Row("order", "", "", ASCENDING, SILENT, "torchspec/inference/vllm_engine.py:155-170"),
    Row("aux states", NESTED, 3, READ, LOUD, _TS),
    *read(_TS, "use_aux_hidden_state", "fc_norm", "feedback_normed", "target_hidden", "head_dim"),
    *unread(_TS, "norm_before_fc", "norm_before_residual", "norm_before_head", "later_norm", "layers"),
    *unread(_TS, "logit_scale", "tied_head", *BIASES),
    Row("rope theta", "rope_theta", 10_000.0, UNREAD, SILENT, _TS + "/deepseek_eagle.py:204-213", YARN_MLA),
    *names("tools/convert_to_hf.py", MIDLAYER),
    *tensors("tools/convert_to_hf.py", "tensor", LOUD, REFUSED, "*"),
    *tensors("tools/convert_to_hf.py", "missing", SILENT, TARGETS, "embed_tokens.weight"),
    *tensors("tools/convert_to_hf.py", "missing", LOUD, REFUSED, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, OWN, SILENT, _TS),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "written", "", "tools/convert_to_hf.py"),
)
_EXPORT = "tools/convert_to_hf.py:150, export_for_vllm"
TORCHSPEC_VLLM = (
    Row("layer ids", NESTED, "", BEFORE, SILENT, _EXPORT),
    Row("layer ids", "", "", DEFAULT, SILENT, _EXPORT),
    *(row for row in TORCHSPEC if row.fact not in ("layer ids", "name")),
    *names(_EXPORT, LAYERS),
)

OURS = (
    Row("architecture", ARCH, ONE, ANY, LOUD, "suites/algorithms.py"),
    Row("architecture", ARCH, "Qwen3ForCausalLMEagle3", ANY, LOUD, "suites/algorithms.py", QWEN3),
    Row("architecture", ARCH, LATENT, ANY, LOUD, "suites/algorithms.py", MLA),
    Row("layer ids", NESTED, "", "as eagle_config.layer_ids says", LOUD, "harness/conventions.py"),
    Row("aux states", "num_aux_hidden_states", 3, READ, LOUD, "reference/drafts/eagle3_keys.py"),
    *(
        Row(fact, f"eagle_config.{fact}", FLAGS[fact][1], READ, LOUD, "reference/drafts/eagle3_keys.py")
        for fact in ("norm_before_head", "feedback_normed", "later_norm")
    ),
    *read("reference/drafts/eagle3_keys.py", *(f for f in FLAGS if f not in ("rope theta", "head_dim"))),
    *names("reference/drafts/eagle3.py", MIDLAYER, ("model.", ""), LAYERS, *LEGACY),
    *tensors("harness/checkpoints.py", "tensor", LOUD, REFUSED, "*"),
    *tensors("suites/joining.py", "missing", LOUD, TARGETS, "embed_tokens.weight"),
    *tensors("suites/joining.py", "missing", LOUD, TARGETS, "lm_head.weight", where=NO_HEAD_SIZE),
    *tensors("suites/joining.py", "missing", LOUD, REFUSED, "*"),
    Row("embedding", "embed_tokens.weight", TARGETS, OWN, SILENT, "suites/joining.py"),
    VOCAB_MAP,
    Row("t2d", "t2d", "", "written", "", "suites/joining.py"),
)

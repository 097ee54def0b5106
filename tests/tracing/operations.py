"""All ATen operations of the installed PyTorch, sorted: by a rule, made of others, frozen on purpose, or none of ours.

``python tests/tracing/operations.py`` writes the table to docs/operations.md again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from secateur.tracing.rules import RULES

TABLE = Path(__file__).parents[2] / "docs" / "operations.md"

FROZEN = {
    "which positions there are depends on the values": (
        r"nonzero|nonzero_static|unique|_unique2?|unique_(dim|consecutive|dim_consecutive)|masked_(select|scatter)|take|put|"
        r"bincount|hist.*|_histogramdd.*|multinomial|repeat_interleave|segment_reduce|hash_tensor|_unsafe_masked_index.*"
    ),
    "linear algebra of whole matrices: every position of the result is made of all": (
        r"linalg_.*|_linalg_.*|cholesky.*|_cholesky.*|geqrf|ormqr|lu_unpack|triangular_solve|trace|block_diag|"
        r"_compute_linear_combination|_spsolve|dist|_pdist_forward"
    ),
    "losses: what they return belongs to training, not to a network's output": (
        r".*_loss|.*_loss2?d?_forward|binary_cross_entropy.*|_ctc_loss|multilabel_margin_loss_forward|allclose"
    ),
    "quantised or low-precision kernels: prune before, and quantise what comes out": (
        r".*int4pack.*|.*int8pack.*|_scaled_mm.*|_scaled_grouped_mm.*|_int_mm|_dyn_quant.*|_cslt.*|int_repr|qscheme|"
        r".*quantiz.*|q_(per|scale|zero).*|_mixed_dtypes_linear|choose_qparams.*"
    ),
    "random numbers: one draw for each position, so fewer positions are other draws": (
        r"binomial|poisson|cauchy|geometric|log_normal|normal_functional|_standard_gamma|_sample_dirichlet|_philox.*|"
        r"_dirichlet_grad|_fill_mem_eff_dropout_mask"
    ),
    "special functions that networks seldom use": (
        r"special_.*|igammac?|mvlgamma|xlogy|frexp|bitwise_(left|right)_shift|_logcumsumexp|nanmedian"
    ),
    "fused kernels that decide for themselves how many heads or groups there are": (
        r"_flash_attention.*|_efficient_attention_forward|_triton.*|_native_multi_head_attention|"
        r"_transformer_encoder_layer_fwd|_transform_bias_rescale_qkv|_thnn_.*|_lstm_mps|_masked_softmax|_masked_scale"
    ),
    "matrix products of kinds that are rare in networks": r"addr|addbmm|conv_tbc|_addmm_activation|_add_relu|hspmm",
    "they renormalise a weight in place": r"renorm|embedding_renorm",
}
"""Pattern of operations by the reason for which they freeze what they meet."""

OTHERS = {
    "of the backward pass": r".*backward.*|.*_(jvp|grad|grad_.*)|_foobar|.*_bwd",
    "of optimizers and scaling": r"_foreach.*|_fused_(adam|adamw|sgd|adagrad|lion).*|_amp.*|_fused_(dropout|moving).*",
    "of sparse, nested and other layouts": (
        r".*sparse.*|.*nested.*|.*jagged.*|_?coalesced?|_?indices|_?values|_nnz|.*crow.*|.*ccol.*|.*col_indices.*|.*row_indices.*|"
        r"dense_dim|_dim[IV]|_spdiags|.*mkldnn.*|to_padded_tensor|to_dense|_to_dense|_is_coalesced|_coalesced|_coalesce"
    ),
    "of single devices and libraries, in whose place others are seen": (
        r".*cudnn.*|.*miopen.*|.*_mps|_?mps_.*|_nnpack.*|slow_conv.*|_slow_conv.*|.*conv_depthwise.*|.*batch_norm_(elemt|gather|stats|update).*|"
        r"_grid_sampler_2d_cpu_fallback|.*cufft.*|_conv_depthwise.*|batch_norm_.*|_batch_norm.*|_native_batch_norm.*|_cuda.*|"
        r"_upsample_lanczos.*|_stack|native_norm|_conj_physical|_aminmax|_pack_padded_sequence|pin_memory|_pin_memory"
    ),
    "of PyTorch's own workings": (
        r".*_copy|_copy_from|.*_scatter|_functional.*|_test.*|sym_.*|_assert.*|_make_.*|_fw_primal|_lazy_clone|_print|_efficientzerotensor|"
        r"_has_same_storage_numel|_local_scalar_dense|is_.*|_is_.*|equal|set|resize.*|record_stream|from_file|_new_zeros_with.*|"
        r"slice_inverse|_chunk_cat|.*_reference.*|.*async.*|_resize.*|lift.*|_reshape_from.*|_neg_view.*|_propagate.*|_use_.*|"
        r"_weight_norm_.*|__.*|_fused_.*|_linalg_check_errors|.*_tensor_.*|_nested.*|_version|.*_symint|data|_.*_from_.*|"
        r"rename|_mask_.*|_triangular.*|retain.*|_to_.*|to_.*|_validate.*"
    ),
}
"""Pattern of the operations that no forward of a network shows, by what they are."""


def operations() -> dict[str, list[str]]:
    """All operations by the name without underscore and overload: the full names."""
    found: dict[str, list[str]] = {}
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        if full.startswith("aten::"):
            name = full.removeprefix("aten::").split(".")[0]
            name = name[:-1] if name.endswith("_") and not name.endswith("__") else name
            found.setdefault(name, []).append(full)
    return found


def is_composite(full: Iterable[str]) -> bool:
    """Whether PyTorch takes an operation apart before a trace sees it."""
    return all(
        torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        or "out" in name.split(".")[-1]
        for name in full
    )


def sorted_operations() -> dict[str, dict[str, list[str]]]:
    """Kind, then reason, to names; what belongs nowhere is under ``"undecided"``."""
    kinds: dict[str, dict[str, list[str]]] = {"rule": {"": []}, "composite": {"": []}, "frozen": {}, "other": {}}
    undecided: list[str] = []
    for name, full in operations().items():
        if name in RULES:
            kinds["rule"][""].append(name)
        elif is_composite(full):
            kinds["composite"][""].append(name)
        else:
            for kind, table in (("frozen", FROZEN), ("other", OTHERS)):
                reason = next((reason for reason, pattern in table.items() if re.fullmatch(pattern, name)), None)
                if reason is not None:
                    kinds[kind].setdefault(reason, []).append(name)
                    break
            else:
                undecided.append(name)
    return {**kinds, "undecided": {"": undecided}}


def written() -> str:
    """The page."""
    kinds = sorted_operations()
    count = {kind: sum(map(len, table.values())) for kind, table in kinds.items()}
    lines = [
        "# What a trace knows of PyTorch's operations",
        "",
        f"All {sum(count.values()):,} ATen operations of PyTorch {torch.__version__.split('+')[0]}, by their names "
        "without underscores and overloads. A test sorts them again, and fails where one is in no list.",
        "",
        f"- {count['rule']} have a rule, which says how channels pass, and what stays zero where a channel is zero.",
        f"- {count['composite']} are made of others: PyTorch takes them apart before a trace sees them.",
        f"- {count['frozen']} freeze the channels that they meet, on purpose, and say so.",
        f"- {count['other']} are no operations that a network's forward shows.",
        "",
        "An operation that is in no list here, one of a library of your own say, freezes the channels that it meets: "
        "`no rule knows the operation`.",
        "",
        "## With a rule",
        "",
        _listed(kinds["rule"][""]),
        "",
        "## Frozen on purpose",
        "",
    ]
    lines += [f"- {reason}: {_listed(names)}" for reason, names in kinds["frozen"].items()]
    lines += ["", "## No operations of a forward", ""]
    lines += [f"- {reason}: {_listed(names)}" for reason, names in kinds["other"].items()]
    lines += ["", "## Made of others", "", _listed(kinds["composite"][""]), ""]
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")

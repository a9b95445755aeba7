"""The native core's launchers take the fields of their structs by name, and refuse what does not belong there."""

import re

import pytest

TOO_MANY = 2**31  # blocks, rows or tokens of a map


@pytest.fixture(scope="module")
def launchers(simt_build):
    """The fields of every launcher of ops.h, as it declares them."""
    header = re.sub("//.*", "", (simt_build.CSRC / "ops.h").read_text())
    structs = dict(re.findall(r"struct (\w+) \{(.*?)\n\};", header, flags=re.DOTALL))
    return {
        function: [name for line in structs[struct].split(";") for name in re.findall(r"(\w+)(?:,|$)", line.strip())]
        for function, struct in re.findall(r"cudaError_t (\w+)\(const (\w+)& p, cudaStream_t stream\);", header)
    }


@pytest.fixture
def call(emulated_core, launchers):
    """Call a launcher with zeros, no samples and no tensors, but for what is given; None leaves a field out."""

    def run(launcher, **given):
        fields = dict.fromkeys([*launchers[launcher], "device", "stream"], 0)
        fields |= {name: (0,) for name in fields if name.endswith("others")} | given
        getattr(emulated_core, launcher)({name: value for name, value in fields.items() if value is not None})

    return run


def test_every_launcher_takes_all_fields_of_its_struct(launchers, call):
    assert {"select_tokens", "gramian_volume_backward", "quick_gelu"} <= launchers.keys()
    assert launchers["quick_gelu"] == ["x", "y", "size", "dtype"]
    for launcher in launchers:
        call(launcher)


def test_a_field_that_is_missing_is_named(launchers, call):
    for launcher, fields in launchers.items():
        for field in (*fields, "device", "stream"):
            with pytest.raises(TypeError, match=f"^{launcher}: the field {field} is missing$"):
                call(launcher, **{field: None})


def test_a_field_that_is_unknown_is_named(launchers, call):
    for launcher in launchers:
        with pytest.raises(TypeError, match=f"^{launcher} has no field colour: .*, device, stream$"):
            call(launcher, colour=1)


@pytest.mark.parametrize(
    ("launcher", "field", "value"),
    [
        ("select_tokens", "C", 1.5),
        ("select_tokens", "B", 2**63),
        ("select_tokens", "tokens", "address"),
        ("select_tokens", "mask", -1),
        ("quick_gelu", "device", "cuda:0"),
        ("deformable_sample", "offset_range", "far"),
        ("gramian_volume", "others", 7),
        ("gramian_volume", "others", ()),
        ("gramian_volume", "others", (0,) * 5),
        ("gramian_volume_backward", "grad_others", (0, 1.5)),
    ],
)
def test_a_value_of_another_type_is_named(call, launcher, field, value):
    with pytest.raises(TypeError, match=f"^{launcher}: the field {field} is {re.escape(repr(value))}: "):
        call(launcher, **{field: value})


def test_numbers_without_names_are_refused(emulated_core):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        emulated_core.quick_gelu(0, 0, 0, 0, 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        emulated_core.gramian_volume_workspace(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("launcher", "fields"),
    [
        ("select_tokens", {"B": 1, "M": 2, "N": 4, "k_intra": 5, "splits": 1}),
        ("select_tokens", {"B": 1, "M": 2, "N": 4, "dtype": 9, "splits": 1}),
        ("select_tokens", {"B": 1, "M": 2, "N": 1 << 21, "splits": 1}),
        ("select_tokens", {"B": TOO_MANY, "M": 2, "N": 1, "splits": 1}),
        ("select_tokens", {"B": 1, "M": 2, "N": 4}),
        ("select_tokens", {"B": 1 << 30, "M": 2, "N": 4, "splits": 2}),
        ("deformable_sample", {"B": 1, "H": TOO_MANY, "W": 1, "C": 1, "Hk": 2, "Wk": 2}),
        ("deformable_sample_backward", {"B": 1 << 34, "H": 1, "W": 1, "C": 1, "Hk": 2, "Wk": 2}),
        ("attend_masked", {"B": 1, "M": 1, "N": 1, "Q": 25, "C": 1, "splits": 1}),
        ("attend_masked", {"B": 1, "M": 1, "N": 1, "Q": 1, "C": 1}),
        ("attend_masked_backward", {"B": 1, "M": 1, "N": 1, "Q": 1, "C": 513, "splits": 1}),
        ("attend_masked_backward", {"B": 1 << 31, "M": 1, "N": 1, "Q": 1, "C": 1, "splits": 1}),
        ("add_layer_norm", {"rows": 1, "C": 5128}),
        ("add_layer_norm_backward", {"rows": TOO_MANY, "C": 1}),
        ("quick_gelu", {"size": 1 << 39}),
        ("gramian_volume_backward", {"others": (0, 0), "grad_others": (0,)}),
        ("gramian_loss", {"B": 1, "M": 1, "C": 1}),
        ("gramian_loss", {"B": 1, "M": 6, "C": 1}),
        ("gramian_loss_backward", {"B": 1, "M": 6, "C": 1}),
        ("gramian_loss_backward", {"B": 1, "M": 3, "C": 0}),
    ],
)
def test_a_launcher_refuses_what_it_cannot_serve_even_unasked(call, launcher, fields):
    with pytest.raises(RuntimeError, match=f"^{launcher}: invalid argument$"):
        call(launcher, **fields)


def test_more_blocks_than_a_grid_has_are_refused_rather_than_cut_off(call):
    with pytest.raises(RuntimeError, match=r"^gramian_volume: invalid configuration argument$"):
        call("gramian_volume", P=1, Q=(1 << 32) + 1, C=1)


def test_the_shared_memory_of_a_selection_counts_queries_scores_and_what_lists_keep(emulated_core):
    def needed(**sizes):
        return emulated_core.select_tokens_shared_bytes(**({"M": 3, "N": 128, "C": 512, "dtype": 0} | sizes))

    assert needed() == 4 * (6 * 512 + 9 * 128 + 6 * 2)
    assert needed(dtype=1) == needed(dtype=2) == needed()
    assert needed(C=513, dtype=1) == 4 * (6 * 544 + 9 * 128 + 6 * 2)  # one at a time, 32 per step
    assert needed(C=520, dtype=1) == 4 * (6 * 768 + 9 * 128 + 6 * 2)  # eight at a time, 256 per step
    assert needed(N=1 << 40) == needed(M=1 << 40) == 2**63 - 1


def test_the_emulated_device_has_the_shared_memory_of_sm_86(emulated_core):
    assert emulated_core.shared_bytes_per_block(0) == 99 * 1024

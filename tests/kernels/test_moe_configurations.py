"""Which block sizes a call of the experts takes on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext_kernels.moe.configurations import Configuration, Product, Shape, choose, few, file_of, load, rule, save
from qnext_kernels.triton_support import Target

H200 = Target(nvidia=True, shared_memory=227 << 10)
SMALL = (Target(nvidia=True, shared_memory=99 << 10), Target(nvidia=False, shared_memory=64 << 10))
SHAPE = Shape(experts=512, hidden=2048, middle=512, top_k=10, weights="bfloat16")
TOKENS = (1, 2, 16, 17, 64, 500, 2048, 10000, 65536)
PRODUCT = Product(columns=32, depth=64, warps=4, stages=3)


@pytest.mark.parametrize("weights", ["bfloat16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("middle", [512, 256, 128, 64])
@pytest.mark.parametrize("target", [H200, *SMALL])
def test_what_the_rule_loads_at_once_fits_into_shared_memory(target: Target, middle: int, weights: str) -> None:
    shape = SHAPE._replace(middle=middle, weights=weights)
    for tokens in (None, *TOKENS):
        config = rule(shape, tokens, target)
        for product, per_column in ((config.up, 2), (config.down, 1)):
            stage = (config.rows + product.columns * per_column) * product.depth * shape.itemsize
            assert 0 < stage * product.stages <= target.shared_memory
            assert product.depth % 32 == 0


def test_blocks_have_as_many_rows_as_tokens_have_use_for() -> None:
    rows = [rule(SHAPE, tokens, H200).rows for tokens in TOKENS]
    assert rows == sorted(rows)
    assert (rows[0], rows[-1]) == (16, 128)
    few_experts = SHAPE._replace(experts=8)
    assert rule(few_experts, 16, H200).rows == 16
    assert rule(few_experts, 500, H200).rows == 128


def test_one_token_gives_every_multiprocessor_two_programs() -> None:
    config = rule(SHAPE, 1, H200)
    for columns, product in ((SHAPE.middle, config.up), (SHAPE.hidden, config.down)):
        assert SHAPE.top_k * -(-columns // product.columns) >= 2 * 132


def test_few_tokens_are_those_whose_choices_seldom_meet() -> None:
    assert few(SHAPE, 8, H200) is not None
    assert few(SHAPE, 9, H200) is None
    assert few(SHAPE._replace(experts=8), 1, H200) is not None
    assert few(SHAPE._replace(experts=8), 2, H200) is None
    assert few(SHAPE._replace(hidden=1 << 17), 1, H200) is None


def test_where_weights_are_decoded_large_blocks_have_fewer_columns() -> None:
    a100, fp8 = Target(nvidia=True, shared_memory=163 << 10, e4m3=False), SHAPE._replace(weights="float8_e4m3fn")
    for tokens, columns in ((16, 64), (2048, 32), (65536, 32)):
        config = rule(fp8, tokens, a100)
        assert config.down.columns == columns
        assert config == rule(fp8, tokens, a100._replace(e4m3=True))._replace(down=config.down), (
            "nothing else depends on it"
        )


def test_a_file_comes_back_as_it_was_written_and_the_next_measured_number_of_tokens_counts(tmp_path: Path) -> None:
    found = {tokens: Configuration(tokens, PRODUCT, PRODUCT._replace(columns=64)) for tokens in (16, 32, 64)}
    file = file_of("NVIDIA H200", tmp_path / "tuned")
    save(file, "3.8.0", {SHAPE: found})
    assert file.name == "NVIDIA_H200.json"
    assert load(file) == {SHAPE: found}

    def chosen(
        tokens: int, shape: Shape = SHAPE, *, gpu: str | None = "NVIDIA H200", mode: bool = False
    ) -> Configuration:
        return choose(shape, tokens, H200, gpu, deterministic=mode, directory=file.parent)

    assert [chosen(tokens).rows for tokens in (1, 16, 17, 32, 33, 64, 65, 9999)] == [16, 16, 32, 32, 64, 64, 64, 64]
    assert chosen(16, SHAPE._replace(middle=64)) == rule(SHAPE._replace(middle=64), 16, H200)
    assert chosen(16, gpu="NVIDIA A100") == chosen(16, gpu=None) == rule(SHAPE, 16, H200)


def test_the_deterministic_mode_takes_one_configuration_for_any_number_of_tokens(tmp_path: Path) -> None:
    save(file_of("GPU", tmp_path), "3.8.0", {SHAPE: {16: Configuration(16, PRODUCT, PRODUCT)}})
    chosen = {choose(SHAPE, tokens, H200, "GPU", deterministic=True, directory=tmp_path) for tokens in TOKENS}
    assert chosen == {rule(SHAPE, None, H200)}


@pytest.mark.parametrize("text", ["{", "{}", '{"shapes": [{"experts": 512}]}', '{"shapes": [1]}'])
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json: expected tuned configurations"):
        load(file)

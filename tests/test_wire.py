"""What travels up, to the byte: round trips, sizes, error feedback, and payloads that lie."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from states import make_specs, random_state, same
from torch import Tensor

from rolora.algorithm.choices import Format
from rolora.algorithm.codec import Tensors, WireError, body_bytes, decode, encode, num_bytes
from rolora.algorithm.seeding import generator

FORMATS: tuple[Format, ...] = ("fp32", "bf16", "int8", "int4")
BLOCKS = {"int8": (128, 127), "int4": (32, 7)}
every_format = pytest.mark.parametrize("format", FORMATS)
blockwise = pytest.mark.parametrize("format", ["int8", "int4"])
WORST = {"bf16": 2**-8, "int8": 0.5 / 127 * (1 + 2**-7), "int4": 0.5 / 7 * (1 + 2**-7)}


def normal(shape: tuple[int, ...], *seed: str | int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator(0, *seed)) * scale


def zeros(like: Tensors) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def through(format: Format, moves: Tensors) -> dict[str, Tensor]:
    """What arrives of these moves, from a start of zero."""
    payload, _ = encode(format, moves, zeros(moves), {})
    return decode(format, payload, zeros(moves))


# the round trip


def test_fp32_arrives_bit_for_bit() -> None:
    received = random_state(make_specs(), 0)
    trained = {name: tensor * 1.1 for name, tensor in received.items()}
    trained["base_model.model.score.bias"] = torch.tensor([1e-45, -0.0, 3.4e38])
    payload, kept = encode("fp32", trained, received, {})
    assert same(decode("fp32", payload, received), trained)
    assert kept == {}


@blockwise
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-37, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, 300])
def test_no_element_is_off_by_more_than_half_the_step_of_its_block(
    format: Format, scale: float, length: int
) -> None:
    size, largest = BLOCKS[format]
    moves = normal((length,), "moves", length, scale=scale)
    missed = (through(format, {"x": moves})["x"].double() - moves.double()).abs()
    for block, error in zip(torch.split(moves, size), torch.split(missed, size), strict=True):
        # a step is absmax / largest, rounded up to a bfloat16; the smallest of those is 2**-133
        step = float(block.abs().max()) / largest * (1 + 2**-7) + 2**-133
        assert float(error.max()) <= step / 2 * (1 + 1e-5)


@settings(max_examples=200)
@given(
    st.lists(
        st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=True), min_size=1, max_size=140
    ),
    st.sampled_from(FORMATS[1:]),
)
def test_any_finite_move_arrives_within_half_a_step(values: list[float], format: Format) -> None:
    moves = torch.tensor(values)
    arrived = through(format, {"x": moves})["x"]
    bound = float(moves.abs().max()) * WORST[format] * (1 + 1e-5) + 2**-134
    assert float((arrived.double() - moves.double()).abs().max()) <= bound


def test_a_block_s_step_hangs_on_that_block_alone() -> None:
    moves = torch.cat([torch.full((128,), 1e6), normal((128,), "small", scale=1e-3)])
    missed = (through("int8", {"x": moves})["x"] - moves).abs()
    assert float(missed[128:].max()) < 2e-5


@every_format
def test_what_did_not_move_arrives_unmoved(format: Format) -> None:
    received = {"x": normal((5, 40), "x"), "y": torch.zeros(3)}
    payload, kept = encode(format, received, received, {})
    assert same(decode(format, payload, received), received)
    assert all(not tensor.any() for tensor in kept.values())


@every_format
def test_the_same_values_give_the_same_bytes_in_any_order_of_names(format: Format) -> None:
    moves = {name: normal((7, 9), name) for name in ("b", "a", "c")}
    again = dict(sorted(moves.items()))
    assert encode(format, moves, zeros(moves), {})[0] == encode(format, again, zeros(again), {})[0]


def test_ties_go_to_the_even_code() -> None:
    moves = torch.tensor([127.0, 0.5, 1.5, -0.5, -1.5, 2.5])
    assert through("int8", {"x": moves})["x"].tolist() == [127.0, 0.0, 2.0, 0.0, -2.0, 2.0]


@every_format
def test_nothing_to_send_is_no_byte(format: Format) -> None:
    payload, kept = encode(format, {}, {}, {})
    assert (decode(format, payload, {}), kept, num_bytes(format, {})) == ({}, {}, 0)


# sizes


@pytest.mark.parametrize(
    ("format", "shape", "expected"),
    [
        ("fp32", (384, 4), 4 * 1536),
        ("bf16", (384, 4), 2 * 1536),
        ("int8", (384, 4), 1536 + 2 * 12),
        ("int4", (384, 4), 768 + 2 * 48),
        ("int8", (129,), 129 + 2 * 2),
        ("int4", (33,), 17 + 2 * 2),
        ("int8", (), 1 + 2),
        ("int4", (), 1 + 2),
    ],
)
def test_the_bytes_of_a_tensor_are_these(
    format: Format, shape: tuple[int, ...], expected: int
) -> None:
    like = {"x": torch.zeros(shape)}
    assert num_bytes(format, like) == expected
    ((_, sent),) = load(encode(format, like, like, {})[0]).items()
    assert sent.numel() * sent.element_size() == expected


@pytest.mark.parametrize(("format", "most"), [("int8", 1.02), ("int4", 0.57), ("bf16", 2.0)])
def test_an_element_of_a_large_tensor_costs_at_most_this(format: Format, most: float) -> None:
    assert num_bytes(format, {"x": torch.zeros(1000, 999)}) / 999_000 <= most


@every_format
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_the_payload_of_a_small_encoder_s_round_is_within_a_hundredth_of_its_codes(
    format: Format, factor: str
) -> None:
    shape = (4, 384) if factor == "lora_A" else (384, 4)
    like = {
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{which}.{factor}.weight": (
            torch.zeros(shape)
        )
        for layer in range(6)
        for which in ("query", "value")
    }
    payload, _ = encode(format, like, like, {})
    assert len(payload) <= 1.01 * num_bytes(format, like)


# error feedback


def sent_over(format: Format, rounds: int, feedback: bool) -> tuple[Tensor, Tensor]:
    """The sums of the wanted and of the decoded moves of a client that sends this often.

    The moves have a part that is always the same and smaller than half a step of int4.
    """
    wanted, arrived = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    residual: dict[str, Tensor] = {}
    for round in range(rounds):
        move = torch.full((64,), 0.02)
        move[0] = 1.0 if round % 2 else -1.0
        payload, kept = encode(format, {"x": move}, {"x": torch.zeros(64)}, residual)
        residual = kept if feedback else {}
        wanted += move.double()
        arrived += decode(format, payload, {"x": torch.zeros(64)})["x"].double()
    return wanted, arrived


@pytest.mark.parametrize("rounds", [1, 7, 100])
@pytest.mark.parametrize(
    ("format", "step"), [("bf16", 2**-7), ("int8", 1.3 / 127), ("int4", 1 / 5)]
)
def test_all_that_arrived_is_within_one_step_of_all_that_was_wanted(
    format: Format, step: float, rounds: int
) -> None:
    wanted, arrived = sent_over(format, rounds, feedback=True)
    assert float((wanted - arrived).abs().max()) <= step


def test_without_feedback_small_moves_would_be_lost_for_ever() -> None:
    wanted, arrived = sent_over("int4", 100, feedback=False)
    assert float(wanted[1]) == pytest.approx(2.0)
    assert float(arrived[1]) == 0.0


@pytest.mark.parametrize("format", FORMATS[1:])
def test_the_residual_is_what_was_wanted_less_what_arrived(format: Format) -> None:
    received, trained = {"x": torch.zeros(9, 30)}, {"x": normal((9, 30), "x")}
    before = {"x": normal((9, 30), "kept", scale=1e-3), "y": torch.ones(2)}
    payload, kept = encode(format, trained, received, before)
    arrived = decode(format, payload, received)["x"]
    assert kept.keys() == {"x"}
    assert torch.equal(kept["x"], trained["x"] + before["x"] - arrived)
    assert float(kept["x"].abs().max()) > 0


# sparse payloads

DOWN, UP, HEAD = "x.lora_A.weight", "x.lora_B.weight", "score.bias"
HELD = {DOWN: normal((3, 5), DOWN), UP: normal((7, 10), UP), HEAD: normal((4,), HEAD)}
ROW, COLUMNS = 1, (0, 8, 9)


def few_moved() -> dict[str, Tensor]:
    """One row of lora_A and three columns of lora_B have moved, and the head has not."""
    trained = {name: tensor.clone() for name, tensor in HELD.items()}
    trained[DOWN][ROW, 2] += 1.0
    trained[UP][:, COLUMNS] += normal((7, 3), "moved")
    return trained


@every_format
def test_of_a_sparse_upload_the_moved_pieces_travel_and_the_others_arrive_as_they_were(
    format: Format,
) -> None:
    trained = few_moved()
    payload, _ = encode(format, trained, HELD, {}, sparse=True)
    arrived = decode(format, payload, HELD, sparse=True)
    dense = decode(format, encode(format, trained, HELD, {})[0], HELD)
    assert torch.equal(arrived[HEAD], HELD[HEAD])
    still = [column for column in range(10) if column not in COLUMNS]
    assert torch.equal(arrived[UP][:, still], HELD[UP][:, still])
    assert torch.equal(arrived[DOWN][[0, 2]], HELD[DOWN][[0, 2]])
    for name, tensor in dense.items():
        assert torch.allclose(arrived[name], tensor, rtol=0, atol=0.3 if format == "int4" else 0.05)
    if format == "fp32":
        assert same(arrived, trained)
    # a bit for each of 3 rows, 10 columns and 1 head; then the elements of what moved
    pieces = num_bytes(format, {"row": torch.zeros(5)}) + num_bytes(format, {"b": torch.zeros(21)})
    assert body_bytes(payload) == 1 + 2 + 1 + pieces
    ((_, body),) = load(payload).items()
    assert body.numel() == body_bytes(payload)


@every_format
def test_a_sparse_upload_of_everything_costs_a_bit_a_piece_more_than_a_dense_one(
    format: Format,
) -> None:
    trained = {name: tensor + 1.0 for name, tensor in HELD.items()}
    sparse, dense = (encode(format, trained, HELD, {}, sparse=how)[0] for how in (True, False))
    assert body_bytes(sparse) == body_bytes(dense) + 4
    assert same(
        decode(format, sparse, HELD, sparse=True),
        {**decode(format, dense, HELD), UP: decode(format, sparse, HELD, sparse=True)[UP]},
    )


@blockwise
def test_the_residual_of_a_piece_that_does_not_travel_waits_as_it_is(format: Format) -> None:
    before = {UP: normal((7, 10), "kept", scale=1e-2)}
    payload, kept = encode(format, few_moved(), HELD, before, sparse=True)
    arrived = decode(format, payload, HELD, sparse=True)[UP]
    still = [column for column in range(10) if column not in COLUMNS]
    assert torch.equal(kept[UP][:, still], before[UP][:, still])
    missed = few_moved()[UP] - HELD[UP] + before[UP] - (arrived - HELD[UP])
    assert torch.allclose(kept[UP], missed, rtol=0, atol=1e-6)


@every_format
def test_a_sparse_payload_whose_bits_fit_neither_its_length_nor_its_kind_is_refused(
    format: Format,
) -> None:
    payload = bytearray(encode(format, few_moved(), HELD, {}, sparse=True)[0])
    start = len(payload) - body_bytes(bytes(payload))
    lies = [
        bytes(payload[:start]),
        b"",
        bytes(payload[:9]),
        bytes(payload[:-1]),
        bytes(payload[8:]),
    ]
    for at in range(start, start + 4):
        wrong = bytearray(payload)
        wrong[at] ^= 1
        lies.append(bytes(wrong))
    for lie in lies:
        with pytest.raises(WireError, match="the payload"):
            decode(format, lie, HELD, sparse=True)
    with pytest.raises(WireError, match="the payload"):
        decode(format, bytes(payload), HELD)
    with pytest.raises(WireError, match="the payload"):
        decode(format, encode(format, few_moved(), HELD, {})[0], HELD, sparse=True)


# what is refused


@every_format
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_encoded(format: Format, bad: float) -> None:
    trained = {"a": torch.zeros(3), "b.weight": torch.tensor([0.0, bad, 1.0])}
    with pytest.raises(WireError, match=r"^b\.weight has values that are not finite$"):
        encode(format, trained, zeros(trained), {})


def test_a_move_that_rounds_past_the_largest_float_is_not_encoded() -> None:
    with pytest.raises(WireError, match="x has values that are not finite"):
        encode("int4", {"x": torch.tensor([3.4028e38])}, {"x": torch.zeros(1)}, {})


def test_another_dtype_than_float32_is_neither_encoded_nor_decoded() -> None:
    like = {"x": torch.zeros(3, dtype=torch.float64)}
    with pytest.raises(WireError, match=r"x has dtype torch\.float64"):
        encode("int8", like, like, {})
    payload, _ = encode("fp32", {"x": torch.zeros(3)}, {"x": torch.zeros(3)}, {})
    with pytest.raises(WireError, match=r"x has dtype torch\.float64"):
        decode("fp32", payload, like)


LIKE = {"x.lora_B.weight": torch.ones(40, 4), "y.lora_B.weight": torch.zeros(3)}


def honest(format: Format) -> bytes:
    trained = {name: tensor + normal(tuple(tensor.shape), name) for name, tensor in LIKE.items()}
    return encode(format, trained, LIKE, {})[0]


def refused(format: Format, payload: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why) as caught:
        decode(format, payload, LIKE)
    assert "\n" not in str(caught.value)


@every_format
def test_a_payload_of_another_length_is_refused(format: Format) -> None:
    payload = honest(format)
    for wrong in (b"", payload[:7], payload[:-1], payload + b"\0", payload * 2, b"\xff" * 50):
        refused(format, wrong, f"^the payload has {len(wrong)} bytes, expected {len(payload)} ")


@every_format
def test_a_payload_in_another_format_is_refused(format: Format) -> None:
    for other in set(FORMATS) - {format}:
        refused(format, honest(other), "the payload")


@blockwise
@pytest.mark.parametrize(
    "other",
    [
        {"x.lora_A.weight": torch.ones(40, 4), "y.lora_B.weight": torch.zeros(3)},
        {"x.lora_B.weight": torch.ones(4, 40), "y.lora_B.weight": torch.zeros(3)},
        {"x.lora_B.weight": torch.ones(160), "y.lora_B.weight": torch.zeros(3)},
        {"x.lora_B.weight": torch.ones(3), "y.lora_B.weight": torch.zeros(40, 4)},
        {"../x": torch.ones(40, 4), "y.lora_B.weight": torch.zeros(3)},
    ],
)
def test_other_names_or_shapes_are_refused_though_the_bytes_are_as_many(
    format: Format, other: dict[str, Tensor]
) -> None:
    payload, _ = encode(format, other, zeros(other), {})
    assert len(payload) == len(honest(format))
    refused(format, payload, "other names, shapes or another format")


def with_header(text: str, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + body


@blockwise
def test_headers_that_lie_are_refused_before_anything_reads_them(format: Format) -> None:
    payload = honest(format)
    length = int.from_bytes(payload[:8], "little")
    text, body = payload[8 : 8 + length].decode(), payload[8 + length :]
    ((title, entry),) = json.loads(text).items()
    twice = text.rstrip().removesuffix("}") + "," + text.strip().removeprefix("{")
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)}
    lies = [
        text.replace('"U8"', '"I8"'),
        text.replace(f"[{len(body)}]", f"[1,{len(body)}]"),
        text.replace("data_offsets", "data_0ffsets"),
        text.replace(f"[0,{len(body)}]", f"[1,{len(body)}]"),
        twice,
        json.dumps({title: entry, **many}),
        "{" * length,
    ]
    for lie in lies:
        assert lie != text
        refused(format, with_header(lie, body), "the payload")
    refused(format, b"\xff" * 8 + payload[8:], "header is not that of")
    assert decode(format, with_header(text, body), LIKE).keys() == LIKE.keys()


@blockwise
@pytest.mark.parametrize("scale", [math.inf, math.nan, -math.inf, -1.0])
def test_a_scale_that_is_no_finite_size_is_refused(format: Format, scale: float) -> None:
    payload = bytearray(honest(format))
    payload[-2:] = torch.tensor([scale], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    refused(format, bytes(payload), r"^y\.lora_B\.weight has a scale")


@every_format
def test_values_past_the_largest_float_are_refused_on_arrival(format: Format) -> None:
    payload = bytearray(honest(format))
    huge = 3.38e38  # as a scale, times a code of 2 or more, and as a value next to infinity
    if format in BLOCKS:
        payload[-2:] = (
            torch.tensor([huge], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        )
    else:
        payload[-1] = 0x7F if format == "bf16" else 0xFF
        payload[-2] = 0x80
    refused(format, bytes(payload), r"^y\.lora_B\.weight has values that are not finite")


@every_format
def test_a_payload_is_a_safetensors_file_with_one_tensor(format: Format) -> None:
    payload = honest(format)
    ((title, sent),) = load(payload).items()
    assert title.startswith(f"{format}-")
    assert sent.dtype == torch.uint8
    assert save({title: sent}) == payload

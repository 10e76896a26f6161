"""The contract of a Codec: `encode(message) -> bytes` and `decode(bytes) -> message`, without loss.

    Example(lambda: PCCodec(circuit()), kind="Codec", inputs=[Ints((5, 8), 16)], stated={"bound": lambda m: ...})

`inputs`: messages, one by one; let empty and extreme ones be among them. `stated["bound"]`: the largest number of bytes
that a message may take.
"""

from __future__ import annotations

from typing import Any

from laconic.errors import BadInput

from ..contract import Broken, needs, require
from ..example import Example
from ..tensors import copied, same, tensors

_REFUSALS = (ValueError, BadInput)


def check_codec_round_trip(example: Example) -> None:
    """Every message comes back exactly, decoded by a fresh object, and is not changed by encoding it."""
    for i, message in enumerate(_messages(example)):
        before = copied(message)
        packed = _encoded(example.build(), message)
        same(copied(message), before, f"encoding changed message {i}")
        back = example.build().decode(packed)
        if tensors(message):
            same(back, message, f"message {i} does not come back")
        else:
            require(back == message and type(back) is type(message), f"message {i} does not come back: {back!r:.80}")


def check_codec_repeats(example: Example) -> None:
    """The same message gives the same bytes."""
    for i, message in enumerate(_messages(example)):
        first, second = _encoded(example.build(), message), _encoded(example.build(), message)
        require(first == second, f"message {i} gives other bytes the second time")


def check_codec_bounded(example: Example) -> None:
    """No message takes more bytes than stated."""
    if "bound" not in example.stated:
        raise BadInput(f"the example {example.name} states no bound: give stated={{'bound': lambda message: ...}}")
    for i, message in enumerate(_messages(example)):
        size, bound = len(_encoded(example.build(), message)), example.stated["bound"](message)
        require(size <= bound, f"message {i} takes {size} bytes, and at most {bound} are stated")


def check_codec_refuses_truncated(example: Example) -> None:
    """Bytes that stop early are refused, wherever they stop."""
    packed = _longest(example)
    places = sorted({0, len(packed) - 1, *range(0, len(packed), max(1, len(packed) // 16))})
    for place in places:
        _refused(example, packed[:place], f"{place} of {len(packed)} bytes")


def check_codec_refuses_extended(example: Example) -> None:
    """Bytes after the end are refused."""
    packed = _longest(example)
    for tail in (b"\0", b"\xff\xff\xff\xff", packed):
        _refused(example, packed + tail, f"{len(tail)} bytes too many")


def check_codec_survives_damage(example: Example) -> None:
    """A damaged byte is refused, or gives another message; it never ends in any other error."""
    for place, packed in _damaged(example):
        try:
            example.build().decode(packed)
        except _REFUSALS:
            continue
        except Exception as error:
            raise Broken(f"damage at byte {place} raised {type(error).__name__}: {error}") from error


@needs("checksum")
def check_codec_notices_damage(example: Example) -> None:
    """Every damaged byte is noticed."""
    for place, packed in _damaged(example):
        _refused(example, packed, f"damage at byte {place}")


def _messages(example: Example) -> tuple:
    messages = example.arguments()
    if not messages:
        raise BadInput(f"the example {example.name} has no messages")
    return messages


def _encoded(codec: Any, message: Any) -> bytes:
    packed = codec.encode(message)
    require(isinstance(packed, bytes), f"encode gives {type(packed).__name__}, not bytes")
    return packed


def _longest(example: Example) -> bytes:
    packed = max((_encoded(example.build(), m) for m in _messages(example)), key=len)
    require(packed, "the longest message takes no bytes: nothing could be noticed")
    return packed


def _damaged(example: Example) -> list[tuple[int, bytes]]:
    packed = _longest(example)
    places = range(0, len(packed), max(1, len(packed) // 32))
    return [(i, packed[:i] + bytes([packed[i] ^ 0x5A]) + packed[i + 1 :]) for i in places]


def _refused(example: Example, packed: bytes, what: str) -> None:
    try:
        example.build().decode(packed)
    except _REFUSALS as error:
        require(str(error).strip(), f"{what}: the refusal says nothing")
    except Exception as error:
        raise Broken(f"{what}: raised {type(error).__name__} ({error}): a ValueError or BadInput is clear") from error
    else:
        raise Broken(f"{what}: was decoded without a word")

"""Personal data, replaced by what kind it was: addresses of mail and of machines, numbers of people and of cards."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator

from ..document import Document, Dropped
from .registry import step

Span = tuple[int, int]
PLACEHOLDER = "[{kind}]"

# Bounded, and begun only where nothing of its kind goes before, so that a long run of letters is read once.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"(?:[A-Za-z]{2,63}|xn--[A-Za-z0-9-]{1,59})(?![A-Za-z0-9-])"
)
_IPV4 = re.compile(r"(?<![0-9A-Za-z_.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9A-Za-z_]|\.[0-9])")
_POINT = re.compile(r"\.[0-9]{1,3}\.[0-9]")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:(?:\.[0-9]{1,3}){3})?(?![0-9A-Za-z:])"
)
_CHINESE_ID = re.compile(r"(?<![0-9A-Za-z])[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z])")
_CARD = re.compile(r"(?<![0-9A-Za-z.,])[0-9](?:[ -]?[0-9]){12,18}(?![0-9A-Za-z]|[.,-][0-9])")
# Seven digits of any script, each at most four characters after the one before: no number has fewer.
_PHONE = re.compile(r"\d(?:[^\d\n]{0,4}\d){6,}")
_BEFORE, _AFTER = 8, 24  # what phonenumbers looks at around a number: signs before it, an extension after it

# Prefixes and lengths by issuer: ISO/IEC 7812, as the networks publish them.
_ISSUERS = (
    (re.compile("4"), (13, 16, 19)),  # Visa
    (re.compile("5[1-5]|222[1-9]|22[3-9]|2[3-6]|27[01]|2720"), (16,)),  # Mastercard
    (re.compile("3[47]"), (15,)),  # American Express
    (re.compile("6011|64[4-9]|65"), (16, 19)),  # Discover
    (re.compile("35(?:2[89]|[3-8])"), (16, 17, 18, 19)),  # JCB
    (re.compile("3(?:0[0-5]|[689])"), (14, 16, 17, 18, 19)),  # Diners Club
    (re.compile("62|81"), (16, 17, 18, 19)),  # UnionPay
)
_ID_WEIGHTS = tuple(2**power % 11 for power in range(17, 0, -1))
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")


def passes_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812 annex B."""
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_chinese_id(number: str) -> bool:
    """Whether 18 characters are a resident's number: date of birth and check digit (GB 11643, ISO 7064 MOD 11-2)."""
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    rest = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number[:17], strict=True)) % 11
    return "10X98765432"[rest] == number[17].upper()


def is_card(number: str) -> bool:
    """Whether digits are a payment card's number by prefix, length and check digit."""
    return passes_luhn(number) and any(
        len(number) in lengths and prefix.match(number) is not None for prefix, lengths in _ISSUERS
    )


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def _addresses(text: str, private: bool) -> Iterator[Span]:
    # Each pattern is slow where it begins; what it must hold is looked for first.
    for pattern in (p for p, part in ((_IPV4, _POINT), (_IPV6, _COLONS)) if part.search(text)):
        for match in pattern.finditer(text):
            address = _address(match[0])
            if address is not None and (private or _is_public(address)):
                yield match.span()


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Outside 2000::/3 no IPv6 address is given out, and text such as a::b has that form."""
    return address.is_global and not address.is_multicast and (address.version == 4 or address in _GLOBAL_IPV6)


def _chinese_ids(text: str) -> Iterator[Span]:
    return (match.span() for match in _CHINESE_ID.finditer(text) if is_chinese_id(match[0]))


def _cards(text: str) -> Iterator[Span]:
    return (m.span() for m in _CARD.finditer(text) if is_card(m[0].replace(" ", "").replace("-", "")))


def _phones(text: str, regions: tuple[str, ...]) -> Iterator[Span]:
    import phonenumbers

    end = 0
    for start, stop in _windows(text):
        window = text[start:stop]
        spans = [
            (start + found.start, start + found.end)
            for region in regions or (None,)
            for found in phonenumbers.PhoneNumberMatcher(window, region)
        ]
        for span in sorted(spans):
            if span[0] >= end:
                yield span
                end = span[1]


def _windows(text: str) -> Iterator[Span]:
    """Where numbers may be, with what is around them; a whole text takes the library 100 times as long."""
    before: Span | None = None
    for match in _PHONE.finditer(text):
        start, stop = max(0, match.start() - _BEFORE), min(len(text), match.end() + _AFTER)
        while stop < len(text) and text[stop].isdigit():
            stop += 1
        if before is not None and start < before[1]:
            before = before[0], max(stop, before[1])
            continue
        if before is not None:
            yield before
        before = start, stop
    if before is not None:
        yield before


KINDS = ("email", "ip", "id", "card", "phone")  # in this order: part of a card's number may be a phone's


def _check(*, kinds: tuple[str, ...], regions: tuple[str, ...], placeholder: str, **_: object) -> None:
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds holds {unknown[0]!r}, expected some of {', '.join(KINDS)}")
    if any(character.isdigit() for character in placeholder) or "@" in placeholder:
        raise ValueError(f"placeholder is {placeholder!r}, expected neither digits nor @, which are what is masked")
    if "phone" in kinds and regions:
        import phonenumbers

        if unknown := [region for region in regions if region not in phonenumbers.SUPPORTED_REGIONS]:
            raise ValueError(
                f"regions holds {unknown[0]!r}, expected countries of ISO 3166 in two capitals, such as 'US'"
            )


@step(needs={"phonenumbers": ("kinds", "phone")}, check=_check)
def personal_data(
    document: Document,
    *,
    kinds: tuple[str, ...] = KINDS,
    regions: tuple[str, ...] = ("US", "CN"),
    private_ips: bool = False,
    placeholder: str = PLACEHOLDER,
) -> Document | Dropped:
    """Mask e-mail and IP addresses, Chinese identity numbers, payment cards and telephone numbers.

    Each is replaced by `placeholder`, in which {kind} becomes EMAIL, IP, ID, CARD or PHONE, and counted by kind in
    meta["masked"]. Addresses and numbers must be valid: by ipaddress, by check digit, and by prefix and length of a
    card's network; telephone numbers by phonenumbers, as written in one of the regions or with + and a country's code.
    Of IP addresses only public ones are masked, unless `private_ips`.
    """
    text = document.text
    masked: dict[str, int] = {}
    finders: dict[str, Callable[[str], Iterable[Span]]] = {
        "email": _emails,
        "ip": lambda text: _addresses(text, private_ips),
        "id": _chinese_ids,
        "card": _cards,
        "phone": lambda text: _phones(text, regions),
    }
    has_numbers = None
    for kind, find in finders.items():
        if kind in ("id", "card", "phone"):
            # Each of these has seven digits close together; most texts have none.
            has_numbers = _PHONE.search(text) is not None if has_numbers is None else has_numbers
            if not has_numbers:
                break
        if kind in kinds:
            text, count = _replace(text, find(text), placeholder.replace("{kind}", kind.upper()))
            if count:
                masked[kind] = count
    if not masked:
        return document
    before = document.meta.get("masked", {})
    every = {kind: before.get(kind, 0) + masked.get(kind, 0) for kind in {**before, **masked}}
    return document._replace(text=text, meta=document.meta | {"masked": every})


def _replace(text: str, spans: Iterable[Span], placeholder: str) -> tuple[str, int]:
    parts, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            parts += [text[end:start], placeholder]
            end = stop
    return "".join([*parts, text[end:]]), len(parts) // 2

"""Personal data: check digits by their published algorithms, numbers by the library alone, and what is left alone."""

import ipaddress
import random
import string

import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.clean import make_step
from fastlm.data.clean.personal import is_card, is_chinese_id, passes_luhn
from fastlm.data.document import Document


def run(text, meta=None, **options):
    return make_step("personal_data", **options)(Document(text, "a", 1, meta or {}))


def luhn_digit(body):
    """The digit that makes the weighted sum of all a multiple of ten; weights 2, 1, 2, ... from the right."""
    total = 0
    for place, digit in enumerate(reversed(body)):
        product = int(digit) * (2 if place % 2 == 0 else 1)
        total += product - 9 if product > 9 else product
    return str(-total % 10)


def id_digit(body):
    """ISO 7064 MOD 11-2 by its recursion: the check character makes the remainder 1."""
    rest = 0
    for digit in body:
        rest = (rest + int(digit)) * 2 % 11
    check = (1 - rest) % 11
    return "X" if check == 10 else str(check)


@given(st.text("0123456789", min_size=1, max_size=18))
def test_luhn_takes_one_last_digit_of_ten(body):
    assert [d for d in string.digits if passes_luhn(body + d)] == [luhn_digit(body)]


@given(st.integers(110000, 659999), st.dates(), st.integers(0, 999))
def test_chinese_ids_take_one_last_character_of_eleven(region, born, number):
    body = f"{region}{born.year:04d}{born.month:02d}{born.day:02d}{number:03d}"
    assert [c for c in string.digits + "X" if is_chinese_id(body + c)] == [id_digit(body)]
    text = f"身份证号{body}{id_digit(body)}，已登记"
    assert run(text).text == "身份证号[ID]，已登记"
    assert run(f"no{body}{id_digit(body)}", kinds=["id"]).text == f"no{body}{id_digit(body)}"


def test_known_numbers_of_each_kind():
    # The example of GB 11643 and the networks' published test numbers.
    assert is_chinese_id("11010519491231002X")
    assert is_chinese_id("11010519491231002x")
    assert not is_chinese_id("110105194913310029")  # no such month
    cards = ("4111111111111111", "5555555555554444", "2223003122003222", "378282246310005", "6011111111111117",
             "3530111333300000", "30569309025904", "6200000000000005", "4222222222222")  # fmt: skip
    for card in cards:
        assert is_card(card), card
        assert run(f"paid by {card}.").text == "paid by [CARD]."
        grouped = " ".join(card[i : i + 4] for i in range(0, len(card), 4))
        assert run(f"卡号{grouped}。").text == "卡号[CARD]。"
        other = card[:-1] + str((int(card[-1]) + 1) % 10)
        assert run(other, kinds=["card"]).text == other
    assert not is_card("9" * 15 + luhn_digit("9" * 15))


@pytest.mark.parametrize(
    "address",
    ["ann@example.org", "a.b+c_d%e-f@mail.example.co.uk", "x@a-b.museum", "UPPER@EXAMPLE.COM", "o@xn--fsq.xn--0zwm56d"],
)
def test_email_addresses(address):
    for text in ("Write to {}.", "<{}>", "mailto:{}?subject=x", "联系{}谢谢", "({}; other)"):
        result = run(text.format(address))
        assert result.text == text.format("[EMAIL]")
        assert result.meta == {"masked": {"email": 1}}


def test_what_looks_like_an_address_stays():
    for text in (
        "a@b",
        "@name",
        "price @ 3.50 each",
        "user@localhost",
        "foo@bar..com",
        "git@",
        f"{'a' * 65}@example.org",
    ):
        assert run(text).text == text


@given(st.ip_addresses())
@settings(max_examples=200, deadline=None)
def test_ip_addresses_are_those_that_python_reads_and_public_unless_asked(address):
    public = address.is_global and not address.is_multicast
    if address.version == 6:
        public = public and address in ipaddress.ip_network("2000::/3")
    forms = {str(address), *([address.exploded.upper()] if address.version == 6 else [])}
    for form in forms:
        text = f"from {form}, port 80; 地址{form}。"
        assert run(text, kinds=["ip"], private_ips=True).text == "from [IP], port 80; 地址[IP]。"
        assert run(text, kinds=["ip"]).text == ("from [IP], port 80; 地址[IP]。" if public else text)


def test_what_looks_like_an_ip_address_stays():
    for text in (
        "1.2.3",
        "256.1.1.1",
        "1.2.3.4.5",
        "v8.8.8.8",
        "std::vector",
        "a::b",
        "12:30:45",
        "08.8.8.8",
        "1.2.3.4a",
    ):
        assert run(text, kinds=["ip"], private_ips=text not in ("a::b", "std::vector")).text == text
    assert run("8.8.8.8:53 and 2001:4860:4860::8888.", kinds=["ip"]).text == "[IP]:53 and [IP]."
    assert run("127.0.0.1 192.168.1.1 ::1 fe80::1", kinds=["ip"]).text == "127.0.0.1 192.168.1.1 ::1 fe80::1"


def by_the_library(text, regions):
    spans = {(m.start, m.end) for r in regions or (None,) for m in phonenumbers.PhoneNumberMatcher(text, r)}
    parts, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            parts += [text[end:start], "[PHONE]"]
            end = stop
    return "".join([*parts, text[end:]])


REGIONS = ("US", "CN", "DE", "FR", "GB")


def numbers(region):
    example = phonenumbers.example_number_for_type(region, phonenumbers.PhoneNumberType.MOBILE)
    for kind in (phonenumbers.PhoneNumberFormat.INTERNATIONAL, phonenumbers.PhoneNumberFormat.NATIONAL,
                 phonenumbers.PhoneNumberFormat.E164):  # fmt: skip
        yield phonenumbers.format_number(example, kind)


@pytest.mark.parametrize("region", REGIONS)
def test_phone_numbers_of_a_region(region):
    for number in numbers(region):
        for text in ("Call {} now.", "电话：{}，谢谢", "{}", "tel:{};"):
            assert run(text.format(number), regions=[region], kinds=["phone"]).text == text.format("[PHONE]")
    international = next(numbers(region))
    assert run(f"Call {international}.", regions=[], kinds=["phone"]).text == "Call [PHONE]."


@pytest.mark.parametrize("regions", [(), ("US",), ("US", "CN"), REGIONS])
def test_phone_numbers_in_long_text_are_those_of_the_library_alone(regions):
    draw = random.Random(len(regions))
    pieces = [
        *(number for region in REGIONS for number in numbers(region)),
        "ext. 123", "12:30", "2024-05-06 12:30:45", "$1,234,567.89", "on 3/10/2011", "word", "电话", "(", ")",
        "\n", "., ",
        "1234567890123", "ISBN 978-0-306-40615-7", "pp. 100-1234567", "＋１ ６５０ ２５３ ００００",
        "１３８００１３８０００", "12345 67890", "0", "a1234567", "x99",
    ]  # fmt: skip
    for _ in range(60):
        text = draw.choice(["", " ", "\n"]).join(draw.choices(pieces, k=12))
        assert run(text, kinds=["phone"], regions=regions).text == by_the_library(text, regions), text


def test_counts_add_up_and_a_second_run_finds_nothing():
    text = "a@b.org, c@d.org; 8.8.8.8; 4111-1111-1111-1111; +86 138 0013 8000"
    result = run(text, {"masked": {"email": 1, "phone": 2}, "url": "u"})
    assert result.text == "[EMAIL], [EMAIL]; [IP]; [CARD]; [PHONE]"
    assert result.meta == {"url": "u", "masked": {"email": 3, "phone": 3, "ip": 1, "card": 1}}
    assert make_step("personal_data")(result) is result


def test_kinds_and_placeholder():
    text = "a@b.org from 8.8.8.8"
    assert run(text, kinds=["ip"]).text == "a@b.org from [IP]"
    assert run(text, placeholder="<|{kind}|>").text == "<|EMAIL|> from <|IP|>"
    assert run(text, placeholder="").text == " from "
    assert run(text, kinds=[]).text == text

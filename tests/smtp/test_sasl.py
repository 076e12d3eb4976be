"""SASL exchanges: what a client's messages make, and that nothing else makes anything."""

from __future__ import annotations

import base64
import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gatepost.smtp.command import AUTH_OCTETS_MAX
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import (
    CHALLENGE_OCTETS_MAX,
    SECRET_OCTETS_MAX,
    TOKEN_OCTETS_MAX,
    USER_OCTETS_MAX,
    Challenge,
    Password,
    Token,
    client_initial,
    client_secret,
    decode,
    exchange,
    prepare_secret,
    prepare_user,
)

MECHANISMS = ("PLAIN", "LOGIN", "XOAUTH2", "OAUTHBEARER")
ALICE = Password("alice", "correct horse")


def steps(mechanism: str, *responses: bytes | None) -> list[Challenge | Password | Token | str]:
    """What each response makes; a refusal as code and status."""
    dialogue = exchange(mechanism)
    assert dialogue is not None
    made: list[Challenge | Password | Token | str] = []
    for response in responses:
        step = dialogue.step(response)
        made.append(step.octets()[:9].decode() if isinstance(step, Reply) else step)
    return made


def made_of(mechanism: str, *responses: bytes) -> Challenge | Password | Token | str:
    """What the last response makes, whether the first came with AUTH or after a challenge."""
    with_command = steps(mechanism, *responses)
    after_challenge = steps(mechanism, None, *responses)
    assert isinstance(after_challenge[0], Challenge)
    assert with_command == after_challenge[1:]
    return with_command[-1]


# ---- base64.  RFC 4954 §4, RFC 4648 §3


@pytest.mark.parametrize(
    ("line", "octets"),
    [(b"", b""), (b"YQ==", b"a"), (b"YWI=", b"ab"), (b"YWJj", b"abc"), (b"+/+/", b"\xfb\xff\xbf"), (b"AA==", b"\0")],
)
def test_a_response_is_decoded(line: bytes, octets: bytes) -> None:
    assert decode(line) == octets


@pytest.mark.parametrize(
    "line",
    [b"=", b"==", b"Y", b"YQ", b"YQ=", b"YQ===", b"YWI==", b"YWJj=", b"YQ==YQ==", b"=YQ=", b" YQ==", b"YQ== ", b"Y Q==",
     b"YQ==\n", b"YQ\t==", b"-_-_", b"!!!!", b"**", b"* ", b" *", b"YQ==*", b"\xff\xff\xff\xff", b"Y\0==", b"QUIT x"],
)  # fmt: skip
def test_what_is_not_base64_ends_the_exchange(line: bytes) -> None:
    reply = decode(line)
    assert isinstance(reply, Reply)
    assert reply.octets().startswith(b"501 5.5.2 ")


def test_a_star_cancels() -> None:
    reply = decode(b"*")
    assert isinstance(reply, Reply)
    assert reply.octets().startswith(b"501 5.7.0 ")


@given(st.binary(max_size=60))
def test_what_was_encoded_is_decoded_and_nothing_raises(octets: bytes) -> None:
    assert decode(base64.b64encode(octets)) == octets
    assert isinstance(decode(octets), bytes | Reply)


def test_a_challenge_is_a_334_in_base64() -> None:
    assert Challenge(b"").reply.octets() == b"334 \r\n"
    assert Challenge(b"Username:").reply.octets() == b"334 VXNlcm5hbWU6\r\n"
    longest = Challenge(b"x" * CHALLENGE_OCTETS_MAX).reply.octets()
    assert decode(longest[4:-2]) == b"x" * CHALLENGE_OCTETS_MAX
    assert len(longest) <= 512


# ---- PLAIN.  RFC 4616


@pytest.mark.parametrize(
    ("message", "password"),
    [
        (b"\0alice\0correct horse", ALICE),
        (b"alice\0alice\0correct horse", ALICE),
        (b"bob\0alice\0correct horse", Password("alice", "correct horse", "bob")),
        (b"ALICE\0alice\0correct horse", Password("alice", "correct horse", "ALICE")),
        (b"\0DOMAIN\\alice\0x", Password("DOMAIN\\alice", "x")),
        (b"\0alice@example.com\0 x ", Password("alice@example.com", " x ")),
        ("\0jose\u0301\0cafe\u0301\u00a0x".encode(), Password("jos\u00e9", "caf\u00e9 x")),
        ("jose\u0301\0jos\u00e9\0x".encode(), Password("jos\u00e9", "x")),
        ("\0alice\0\ufb01\uff41\u200d\U0001f511".encode(), Password("alice", "\ufb01\uff41\u200d\U0001f511")),
    ],
)
def test_plain(message: bytes, password: Password) -> None:
    assert made_of("PLAIN", message) == password
    assert steps("PLAIN", None) == [Challenge(b"")]


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (b"", "501 5.5.2"),
        (b"\0", "501 5.5.2"),
        (b"alice", "501 5.5.2"),
        (b"\0alice", "501 5.5.2"),
        (b"\0alice\0x\0", "501 5.5.2"),
        (b"\0alice\0x\0y", "501 5.5.2"),
        (b"\0\xff\0x", "501 5.5.2"),
        (b"\0alice\0\xc0\x80", "501 5.5.2"),
        (b"\0alice\0\xed\xa0\x80", "501 5.5.2"),
        (b"\0\0", "535 5.7.8"),
        (b"\0\0x", "535 5.7.8"),
        (b"\0alice\0", "535 5.7.8"),
        (b"\0alice\0x\n", "535 5.7.8"),
        (b"\0alice\n\0x", "535 5.7.8"),
        (b"\0 alice\0x", "535 5.7.8"),
        (b" \0alice\0x", "535 5.7.8"),
        (b"b\x07ob\0alice\0x", "535 5.7.8"),
    ],
)
def test_what_is_not_plain_is_refused(message: bytes, refusal: str) -> None:
    assert made_of("PLAIN", message) == refusal


# ---- LOGIN


def test_login_asks_for_the_user_and_then_for_the_secret() -> None:
    asked = [Challenge(b"Username:"), Challenge(b"Password:"), ALICE]
    assert steps("LOGIN", None, b"alice", b"correct horse") == asked
    assert steps("LOGIN", b"alice", b"correct horse") == asked[1:]


@pytest.mark.parametrize(
    ("responses", "refusal"),
    [
        ((b"",), "535 5.7.8"),
        ((b"al\0ice",), "535 5.7.8"),
        ((b"\xff",), "501 5.5.2"),
        ((b"alice", b""), "535 5.7.8"),
        ((b"alice", b"x\0y"), "535 5.7.8"),
        ((b"alice", b"\xff"), "501 5.5.2"),
    ],
)
def test_what_is_not_login_is_refused(responses: tuple[bytes, ...], refusal: str) -> None:
    assert made_of("LOGIN", *responses) == refusal


# ---- XOAUTH2 and OAUTHBEARER


@pytest.mark.parametrize(
    ("message", "token"),
    [
        (b"user=alice@b.test\x01auth=Bearer ya29.vF9-_~+/==\x01\x01", Token("alice@b.test", "ya29.vF9-_~+/==")),
        (b"user=\x01auth=bearer  x \x01\x01", Token("", "x")),
    ],
)  # fmt: skip
def test_xoauth2(message: bytes, token: Token) -> None:
    assert made_of("XOAUTH2", message) == token


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\x01", b"\x01\x01", b"user=a\x01auth=Bearer x\x01", b"user=a\x01auth=Bearer x\x01\x01\x01",
        b"user=a\x01auth=Bearer x\x01\x01 ", b"auth=Bearer x\x01\x01", b"auth=Bearer x\x01user=a\x01\x01",
        b"user=a\x01auth=Basic x\x01\x01", b"user=a\x01auth=Bearer\x01\x01", b"user=a\x01auth=Bearer \x01\x01",
        b"user=a\x01auth=Bearer x y\x01\x01", b"user=a\x01auth=Bearer x\0\x01\x01", b"user=a\x01auth=x\x01\x01",
        b"user=a\x01auth=Bearer x\x01auth=Bearer y\x01\x01", b"user=a\x01auth=Bearer \xc3\xa9\x01\x01",
        b"user=\xff\x01auth=Bearer x\x01\x01", b"n,a=a,\x01auth=Bearer x\x01\x01", b"user=a\x01auth=Bearer =\x01\x01",
    ],
)  # fmt: skip
def test_what_is_not_xoauth2_is_refused(message: bytes) -> None:
    assert made_of("XOAUTH2", message) == "501 5.5.2"


@pytest.mark.parametrize(
    ("message", "token"),
    [
        (
            b"n,a=user@example.com,\x01host=mx.b.test\x01port=143\x01auth=Bearer vF9dft4qmTc2Nvb3RlckBhbHR=\x01\x01",
            Token("user@example.com", "vF9dft4qmTc2Nvb3RlckBhbHR="),
        ),
        (b"n,,\x01auth=Bearer x\x01\x01", Token("", "x")),
        (b"y,,\x01auth=BEARER x\x01x=\x01\x01", Token("", "x")),
        (b"n,a=a=2Cb=3Dc,\x01auth=Bearer x\x01\x01", Token("a,b=c", "x")),
        ("n,a=jose\u0301,\x01auth=Bearer x\x01\x01".encode(), Token("jos\u00e9", "x")),
    ],
)  # fmt: skip
def test_oauthbearer(message: bytes, token: Token) -> None:
    assert made_of("OAUTHBEARER", message) == token


@pytest.mark.parametrize(
    "message",
    [
        b"", b"\x01", b"n,,", b"n,,\x01", b"n,,\x01\x01", b"n,,auth=Bearer x\x01\x01", b"n,,\x01auth=Bearer x\x01",
        b"n,,\x01auth=Bearer x\x01\x01\x01", b"n,,\x01\x01auth=Bearer x\x01\x01", b"n,\x01auth=Bearer x\x01\x01",
        b"p=tls-unique,,\x01auth=Bearer x\x01\x01", b"F,n,,\x01auth=Bearer x\x01\x01",
        b"n,a=,\x01auth=Bearer x\x01\x01",
        b"n,a==2c,\x01auth=Bearer x\x01\x01", b"n,a=a=b,\x01auth=Bearer x\x01\x01", b"n,a=\0,\x01auth=Bearer x\x01\x01",
        b"n,,\x01auth=Bearer x\x01auth=Bearer x\x01\x01", b"n,,\x01auth=Basic x\x01\x01", b"n,,\x01host=x\x01\x01",
        b"n,,\x01auth=Bearer x\x01=y\x01\x01", b"n,,\x01auth=Bearer x\x01y\x01\x01",
        b"n,,\x01auth=Bearer x\x01y=\0\x01\x01",
        b"n,,\x01auth=Bearer x\x01y=\xc3\xa9\x01\x01", b"user=a\x01auth=Bearer x\x01\x01",
        b"n,,\x01auth=Bearer \x01\x01",
    ],
)  # fmt: skip
def test_what_is_not_oauthbearer_is_refused(message: bytes) -> None:
    assert made_of("OAUTHBEARER", message) == "501 5.5.2"


def test_a_user_name_that_is_not_taken_is_refused_with_a_token_too() -> None:
    assert made_of("XOAUTH2", b"user= a\x01auth=Bearer x\x01\x01") == "535 5.7.8"
    assert made_of("OAUTHBEARER", b"n,a=a\x07,\x01auth=Bearer x\x01\x01") == "535 5.7.8"


@pytest.mark.parametrize(("mechanism", "status"), [("XOAUTH2", "401"), ("OAUTHBEARER", "invalid_token")])
@pytest.mark.parametrize("dummy", [b"", b"\x01", b"user=a\x01auth=Bearer x\x01\x01", b"n,,\x01auth=Bearer x\x01\x01"])
def test_a_refused_token_is_told_why_and_nothing_is_tried_again(mechanism: str, status: str, dummy: bytes) -> None:
    dialogue = exchange(mechanism)
    assert dialogue is not None
    assert isinstance(dialogue.step(client_initial(mechanism, Token("a", "x"))), Token)
    challenge = dialogue.denied()
    assert challenge is not None
    assert json.loads(challenge.octets)["status"] == status
    assert challenge.reply.code == 334
    reply = dialogue.step(dummy)
    assert isinstance(reply, Reply)
    assert reply.octets().startswith(b"535 5.7.8 ")


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_a_refused_password_is_answered_at_once(mechanism: str) -> None:
    dialogue = exchange(mechanism)
    assert dialogue is not None
    assert dialogue.denied() is None


@pytest.mark.parametrize("mechanism", ["", "plain", "CRAM-MD5", "SCRAM-SHA-256", "__class__", "ANONYMOUS", "EXTERNAL"])
def test_other_mechanisms_are_not_known(mechanism: str) -> None:
    assert exchange(mechanism) is None


# ---- preparation


@pytest.mark.parametrize(
    "user", ["alice", "Alice", "a b", "DOMAIN\\x", "a@b.test", "o'hara", "\u5f20\u4f1f", "stra\u00dfe"]
)
def test_a_user_name_stays_what_it_is(user: str) -> None:
    assert prepare_user(user) == user


@pytest.mark.parametrize(
    "text",
    [
        "", " ", " a", "a ", "a\0", "a\t", "\x7f", "a\x85", "a\u00a0b", "a\u200bb", "\u202ea", "a\u00adb", "\ufeffa",
        "\uff41", "\u2168", "\ufb01", "a\u2028b", "a\ue000", "\u00aa",
    ],
)  # fmt: skip
def test_a_user_name_has_one_spelling_or_none(text: str) -> None:
    assert prepare_user(text) is None


@pytest.mark.parametrize("text", ["", "a\0", "a\n", "a\r", "\t", "\x7f", "\x85"])
def test_a_secret_holds_no_control_characters(text: str) -> None:
    assert prepare_secret(text) is None


@given(st.text(max_size=40))
@example("e\u0301")
@example("\u2126")
@example("\u3000x")
def test_what_is_prepared_stays_so(text: str) -> None:
    for prepare in (prepare_user, prepare_secret):
        prepared = prepare(text) if text.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in text) else None
        if prepared is not None:
            assert prepare(prepared) == prepared
            assert unicodedata.is_normalized("NFC", prepared)
            assert not set(prepared) & set(map(chr, range(32)))


@pytest.mark.parametrize("character", ["x", "\u00e9", "e\u0301"])
def test_names_and_secrets_are_bounded_in_octets(character: str) -> None:
    for prepare, most in ((prepare_user, USER_OCTETS_MAX), (prepare_secret, SECRET_OCTETS_MAX)):
        one = len(unicodedata.normalize("NFC", character).encode())
        fits = most // one
        assert prepare(character * (fits - 1)) is not None
        assert prepare(character * fits) is not None
        assert prepare(character * (fits + 1)) is None


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
def test_a_token_is_bounded_and_the_longest_fits_a_line(mechanism: str) -> None:
    for length in (TOKEN_OCTETS_MAX - 1, TOKEN_OCTETS_MAX, TOKEN_OCTETS_MAX + 1):
        token = Token("u" * USER_OCTETS_MAX, "x" * length)
        message = client_initial(mechanism, token)
        assert made_of(mechanism, message) == (token if length <= TOKEN_OCTETS_MAX else "535 5.7.8")
        assert len(b"AUTH OAUTHBEARER " + base64.b64encode(message) + b"\r\n") <= AUTH_OCTETS_MAX


# ---- secrets, and what comes


def test_no_secret_is_in_a_repr() -> None:
    assert repr(ALICE) == "Password(user='alice', authzid='')"
    assert repr(Token("alice", "ya29.x")) == "Token(user='alice')"


@given(st.sampled_from(MECHANISMS), st.lists(st.binary(max_size=60), min_size=1, max_size=4), st.booleans())
@example("PLAIN", [b"\0a\0b"], True)
def test_any_responses_at_all(mechanism: str, responses: list[bytes], begins: bool) -> None:
    dialogue = exchange(mechanism)
    assert dialogue is not None
    if begins:
        assert isinstance(dialogue.step(None), Challenge)
    for response in responses:
        step = dialogue.step(response)
        if isinstance(step, Challenge):
            assert step.reply.code == 334
            continue
        if isinstance(step, Reply):
            assert step.code in (501, 535)
        elif isinstance(step, Password):
            assert prepare_user(step.user) == step.user
            assert prepare_secret(step.secret) == step.secret
            assert step.authzid != step.user
        else:
            assert isinstance(step, Token)
        break


# ---- the client's side


@given(
    st.text(min_size=1, max_size=20).filter(lambda text: prepare_user(text) == text),
    st.text(min_size=1, max_size=20).filter(lambda text: prepare_secret(text) == text),
    st.sampled_from(["", "bob"]),
    st.text("AZaz09-._~+/", min_size=1, max_size=30),
)
@example("a,b=c", "=\x20\\", "bob", "x")
def test_what_our_client_says_our_server_reads(user: str, secret: str, authzid: str, token: str) -> None:
    password = Password(user, secret, "" if authzid == user else authzid)
    assert made_of("PLAIN", client_initial("PLAIN", password)) == password
    plain = Password(user, secret)
    assert made_of("LOGIN", client_initial("LOGIN", plain), client_secret(plain)) == plain
    for mechanism in ("XOAUTH2", "OAUTHBEARER"):
        assert made_of(mechanism, client_initial(mechanism, Token(user, token))) == Token(user, token)
        assert made_of(mechanism, client_initial(mechanism, Token("", token))) == Token("", token)


def test_our_client_says_what_the_rfcs_show() -> None:
    assert client_initial("PLAIN", Password("tim", "tanstaaftanstaaf")) == b"\0tim\0tanstaaftanstaaf"  # RFC 4616 §4
    assert client_initial("OAUTHBEARER", Token("a@b.test", "x")) == b"n,a=a@b.test,\x01auth=Bearer x\x01\x01"
    assert client_initial("XOAUTH2", Token("a@b.test", "x")) == b"user=a@b.test\x01auth=Bearer x\x01\x01"


@pytest.mark.parametrize(
    ("mechanism", "credentials"),
    [
        ("PLAIN", Token("a", "x")),
        ("XOAUTH2", ALICE),
        ("CRAM-MD5", ALICE),
        ("OAUTHBEARER", ALICE),
        ("LOGIN", Token("a", "x")),
    ],
)
def test_a_mechanism_takes_its_own_credentials_only(mechanism: str, credentials: Password | Token) -> None:
    with pytest.raises(ValueError, match=mechanism) as caught:
        client_initial(mechanism, credentials)
    assert "correct horse" not in str(caught.value)

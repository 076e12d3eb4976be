"""SCRAM exchanges: the example of RFC 7677, the library's own client, and clients that mean no good."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scramp import ScramClient  # type: ignore[import-untyped]

from gatepost.auth import Denied, Unavailable, Verified
from gatepost.auth.scram import (
    MESSAGE_OCTETS_MAX,
    NONCE_OCTETS_MAX,
    SCRAM,
    SCRAM_PLUS,
    ScramExchange,
    ScramKeys,
    ScramRecord,
    derive,
)
from gatepost.smtp.reply import Reply
from gatepost.smtp.sasl import CHALLENGE_OCTETS_MAX, USER_OCTETS_MAX, Challenge

SALT = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
SERVER_NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
END_POINT = {"tls-server-end-point": b"digest of a certificate", "tls-exporter": b"exported keying material"}
NOBODY = ScramKeys(b"n" * 32, b"n" * 32)


class Directory:
    """One account, "user", with the secrets given; and likenesses of all others."""

    def __init__(self, secrets=None, refusal="", iterations=4096):
        secrets = {"": "pencil"} if secrets is None else secrets
        self.keys = tuple((device, derive(secret, SALT, iterations)) for device, secret in secrets.items())
        self.refusal = refusal
        self.iterations = iterations
        self.asked = []
        self.noted = []

    async def scram(self, user):
        self.asked.append(user)
        if user != "user":
            return ScramRecord("", SALT, self.iterations, (("", NOBODY),), "no such account")
        return ScramRecord("user", SALT, self.iterations, self.keys, self.refusal)

    async def used(self, account, device):
        self.noted.append((account, device))


def exchange(directory=None, *, mechanism=SCRAM, bindings=None):
    return ScramExchange(mechanism, directory or Directory(), bindings or {}, SERVER_NONCE)


PENCIL = "pencil"


class Client:
    """A client that says what the library's cannot: any header, any channel data, extensions."""

    def __init__(self, secret=PENCIL, *, header="n,,", channel=b"", user="user", nonce="rOprNGfwEbeRWgbNEkqO", more=""):
        self.secret, self.header, self.channel, self.nonce, self.more = secret, header, channel, nonce, more
        self.bare = f"n={user},r={nonce}{more}"

    def first(self):
        return f"{self.header}{self.bare}".encode()

    def final(self, server_first, *, nonce=None):
        said = dict(part.split("=", 1) for part in server_first.decode().split(","))
        salted = hashlib.pbkdf2_hmac("sha256", self.secret.encode(), base64.b64decode(said["s"]), int(said["i"]))
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        stored_key = hashlib.sha256(client_key).digest()
        channel = base64.b64encode(self.header.encode() + self.channel).decode()
        without_proof = f"c={channel},r={nonce or said['r']}{self.more}"
        message = f"{self.bare},{server_first.decode()},{without_proof}".encode()
        signature = hmac.digest(stored_key, message, "sha256")
        proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        self.expected = b"v=" + base64.b64encode(
            hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), message, "sha256")
        )
        return f"{without_proof},p={base64.b64encode(proof).decode()}".encode()


async def log_in(client, server):
    """The outcome, or whatever ended the exchange before."""
    answer = await server.step(client.first())
    if not isinstance(answer, Challenge):
        return answer
    answer = await server.step(client.final(answer.octets))
    if not isinstance(answer, Challenge):
        return answer
    assert answer.octets == client.expected
    return await server.step(b"")


# --- As it should be --------------------------------------------------------------------------------------------------


async def test_the_example_of_rfc_7677():
    server = exchange()
    assert await server.step(None) == Challenge(b"")
    assert await server.step(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO") == Challenge(
        b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    final = (
        b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    )
    assert await server.step(final) == Challenge(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=")
    assert await server.step(b"") == Verified("user")


@pytest.mark.parametrize("binding", [None, "tls-server-end-point", "tls-unique"])
async def test_the_librarys_own_client_logs_in(binding):
    bindings = {binding: b"what both ends see"} if binding else {}
    mechanism = SCRAM_PLUS if binding else SCRAM
    client = ScramClient(
        [mechanism], "user", "pencil", channel_binding=(binding, bindings[binding]) if binding else None
    )
    server = exchange(mechanism=mechanism, bindings=bindings)
    first = await server.step(client.get_client_first().encode())
    client.set_server_first(first.octets.decode())
    final = await server.step(client.get_client_final().encode())
    client.set_server_final(final.octets.decode())  # raises where we are not the server that knows the secret
    assert await server.step(b"") == Verified("user")


async def test_a_device_logs_in_with_its_own_secret_and_is_named():
    directory = Directory({"": "pencil", "phone": "abcde-fghjk", "printer": "mnpqr-stuvw"})
    assert await log_in(Client("mnpqr-stuvw"), exchange(directory)) == Verified("user", device="printer")
    assert directory.noted == [("user", "printer")]
    assert await log_in(Client("pencil"), exchange(directory)) == Verified("user")
    assert directory.noted == [("user", "printer")]


@pytest.mark.parametrize("name", list(END_POINT))
async def test_a_channel_binding_binds(name):
    client = Client(header=f"p={name},,", channel=END_POINT[name])
    assert await log_in(client, exchange(mechanism=SCRAM_PLUS, bindings=END_POINT)) == Verified("user")


@pytest.mark.parametrize(
    ("header", "authzid"),
    [
        ("n,a=user,", ""),
        ("n,a=bob=40x=2Cy=3D,", None),
        ("n,a=bob@example.com,", "bob@example.com"),
        ("n,a=b=2Cc=3D,", "b,c="),
    ],
)
async def test_an_authorization_identity_is_told_to_the_caller(header, authzid):
    server = exchange()
    outcome = await log_in(Client(header=header), server)
    if authzid is None:
        assert isinstance(outcome, Reply)
    else:
        assert (outcome, server.authzid) == (Verified("user"), authzid)


async def test_a_name_is_read_with_its_escapes():
    directory = Directory()
    server = exchange(directory)
    await server.step(b"n,,n=a=2Cb=3Dc,r=x")
    assert (directory.asked, server.user) == (["a,b=c"], "a,b=c")


async def test_extensions_are_passed_over():
    assert await log_in(Client(more=",x=something,Y=else"), exchange()) == Verified("user")


# --- As it should not be ----------------------------------------------------------------------------------------------


async def test_a_wrong_secret_is_denied_and_the_exchange_is_over():
    server = exchange()
    first = await server.step(Client().first())
    assert await server.step(Client("pencils").final(first.octets)) == Denied("wrong password")
    assert (await server.step(Client().final(first.octets))).code == 501


@pytest.mark.parametrize("refusal", ["locked", "a bait account"])
@pytest.mark.parametrize("secret", ["pencil", "wrong"])
async def test_an_account_that_is_refused_is_asked_as_any_other(refusal, secret):
    refused, other = exchange(Directory(refusal=refusal)), exchange()
    first = await refused.step(Client().first())
    assert first == await other.step(Client().first())
    assert await refused.step(Client(secret).final(first.octets)) == Denied(refusal)


async def test_nobody_is_asked_as_somebody():
    assert await log_in(Client(user="nobody"), exchange()) == Denied("no such account")


async def test_where_nobody_can_tell_nobody_is_refused():
    class Broken(Directory):
        async def scram(self, user):
            return Unavailable("the disk")

    server = exchange(Broken())
    assert await server.step(Client().first()) == Unavailable("the disk")
    assert (await server.step(b"")).code == 501


@pytest.mark.parametrize(
    ("mechanism", "bindings", "client"),
    [
        (SCRAM, END_POINT, Client(header="y,,")),  # somebody hid -PLUS from the client
        (SCRAM_PLUS, END_POINT, Client(header="y,,")),
        (SCRAM_PLUS, END_POINT, Client(header="n,,")),
        (SCRAM_PLUS, END_POINT, Client(header="p=tls-unique,,", channel=b"x")),
        (SCRAM, END_POINT, Client(header="p=tls-exporter,,", channel=END_POINT["tls-exporter"])),
        (SCRAM_PLUS, END_POINT, Client(header="p=tls-exporter,,", channel=b"the other end of somebody")),
        (SCRAM_PLUS, END_POINT, Client(header="p=tls-exporter,,", channel=END_POINT["tls-server-end-point"])),
        (SCRAM, {}, Client(channel=b"surplus")),
    ],
)
async def test_a_channel_that_is_not_the_same_is_refused_and_is_no_guess(mechanism, bindings, client):
    answer = await log_in(client, exchange(mechanism=mechanism, bindings=bindings))
    assert isinstance(answer, Reply)
    assert answer.code in (501, 535)


async def test_a_client_that_cannot_bind_may_say_so():
    assert await log_in(Client(header="n,,"), exchange(bindings=END_POINT)) == Verified("user")
    assert await log_in(Client(header="y,,"), exchange(bindings={})) == Verified("user")


async def test_another_exchanges_nonce_is_refused():
    server = exchange()
    client = Client()
    first = await server.step(client.first())
    answer = await server.step(client.final(first.octets, nonce="rOprNGfwEbeRWgbNEkqOelse"))
    assert (answer.code, "nonce" in answer.text) == (535, True)


async def test_the_last_message_wants_an_empty_answer():
    server = exchange()
    client = Client()
    first = await server.step(client.first())
    assert isinstance(await server.step(client.final(first.octets)), Challenge)
    assert (await server.step(b"thanks")).code == 501
    assert (await server.step(b"")).code == 501


MALFORMED_FIRST = [
    b"", b"n", b"n,,", b"n,,n=user", b"n,,r=x,n=user", b"n,,n=,r=x", b"n,,n=user,r=", b"n,,m=x,n=user,r=x",
    b"z,,n=user,r=x", b"n,x=y,n=user,r=x", b"n,a=,n=user,r=x", b"p=,,n=user,r=x", b"p=a b,,n=user,r=x",
    b"n,,n=us=er,r=x", b"n,,n=user,r=a\x00b", b"n,,n=user,r=x\r\n", b"n,,n=us\0er,r=x", b"\xff\xfe",
    b"n,,n=user,r=x,", b"n,,n=user,r=x,1=y",
]  # fmt: skip


@pytest.mark.parametrize("message", MALFORMED_FIRST)
async def test_a_malformed_first_message_is_refused(message):
    directory = Directory()
    assert (await exchange(directory).step(message)).code == 501
    assert directory.asked == []


@pytest.mark.parametrize(
    "name", [" user", "us\x01er", "ｕser", "x" * (USER_OCTETS_MAX + 1), "=2C" * (USER_OCTETS_MAX + 1)]
)
async def test_a_name_that_is_not_taken_is_refused_unseen(name):
    directory = Directory()
    answer = await exchange(directory).step(f"n,,n={name},r=x".encode())
    assert isinstance(answer, Reply)
    assert directory.asked == []


@pytest.mark.parametrize(
    ("octets", "taken"), [(NONCE_OCTETS_MAX - 1, 1), (NONCE_OCTETS_MAX, 1), (NONCE_OCTETS_MAX + 1, 0)]
)
async def test_a_clients_nonce_has_a_limit(octets, taken):
    answer = await exchange().step(f"n,,n=user,r={'x' * octets}".encode())
    assert isinstance(answer, Challenge) == bool(taken)
    if taken:
        assert answer.reply.code == 334  # it fits one line
        assert len(answer.octets) + 10 <= CHALLENGE_OCTETS_MAX


@pytest.mark.parametrize(("octets", "taken"), [(-1, True), (0, True), (1, False)])
async def test_a_message_has_a_limit(octets, taken):
    head = b"n,,n=user,r=x,x="
    answer = await exchange().step(head + b"x" * (MESSAGE_OCTETS_MAX - len(head) + octets))
    assert isinstance(answer, Challenge) == taken


@pytest.mark.parametrize(
    "final",
    [
        b"", b"c=biws", b"c=biws,r={r}", b"r={r},c=biws,p=AAAA", b"c=biws,r={r},p=", b"c=biws,r={r},p=AA=A",
        b"c=b,r={r},p=AAAA", b"c=biws,r={r},p=AAAA", b"c=biws,r={r},p=AAAA,x=y", b"c=biws,r={r},p=AAAA\n",
        b"c=biws,r={r},p=!!!!", b"\xff",
    ],
)  # fmt: skip
async def test_a_malformed_final_message_is_refused(final):
    server = exchange()
    await server.step(Client().first())
    nonce = ("rOprNGfwEbeRWgbNEkqO" + SERVER_NONCE).encode()
    assert (await server.step(final.replace(b"{r}", nonce))).code == 501
    assert (await server.step(b"")).code == 501


@given(messages=st.lists(st.one_of(st.none(), st.binary(max_size=60), st.sampled_from(MALFORMED_FIRST)), max_size=4))
def test_no_message_raises_or_gets_in(messages):
    async def talk():
        server = exchange(DIRECTORY)
        for message in [Client().first(), *messages]:
            answer = await server.step(message)
            assert not isinstance(answer, Verified)

    asyncio.run(talk())


DIRECTORY = Directory()


def test_what_no_client_could_prepare_is_no_secret():
    with pytest.raises(ValueError, match="not every client"):
        derive("padlock \U0001f512", SALT, 4096)


def test_no_repr_shows_a_key():
    keys = derive("pencil", SALT, 4096)
    assert repr(keys) == "ScramKeys()"

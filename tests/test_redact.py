"""What the redactor masks, and what it leaves alone."""

import base64
import json
import re
import time
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln.redact import MASK, Redactor, is_secret_name

SECRET = 'pa"ss\\w/ör%d+${x},1'
PEM = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\r\nq83vEjRWeJCrze8SNFZ4kKvN\nab\n-----END KEY-----\n"
SECRET_NAMES = """
    password PASSWORD db_password DB_PASSWD PGPASSWORD MYSQL_PWD ssh_passphrase secret client_secret clientSecret
    secrets github_token GITHUB_TOKEN github-token githubToken accessToken authtoken npmAuthToken tokens api_key apikey
    apiKey API-KEY OPENAI_API_KEY private_key privateKey sshPrivateKey credential credentials AWSCredentials access_key
    aws_access_key_id AWSSecretAccessKey AWS_SESSION_TOKEN auth NPM_AUTH _auth authorization signing_key encryptionKey
    bearer user.password DB_PASS storage_account_key"""
OTHER_NAMES = """
    tokenizer author authors authority authorized_keys max_tokens maxTokens token_count token_type tokenLimit
    password_length password_policy secretary passwordless public_key key keyboard_layout monkey api_url region
    extra_packages compass bypass secret_name num_tokens username user_name key_pair path patch"""


def test_anywhere():
    """A secret is masked wherever it stands."""
    assert Redactor(["hunter2"]).text("hunter2, xhunter2y and hunter2hunter2") == "***, x***y and ***"


def test_nothing_to_mask():
    """A text without secrets stays as it is."""
    assert Redactor(["hunter2"]).text("nothing to see\there") == "nothing to see\there"


def test_longest_first():
    """A secret that contains another is masked whole."""
    assert Redactor(["hunter2", "hunter2-and-more", "more"]).text("a hunter2-and-more b") == "a *** b"


def test_overlap():
    """Secrets that overlap are masked together."""
    assert Redactor(["abcdef", "defghi", "ghijkl"]).text(">abcdefghijkl<") == ">***<"


def test_blank():
    """Blank secrets are ignored."""
    assert Redactor(["", "   ", "\n"]).text("a    b\n\nc") == "a    b\n\nc"


def test_space_around():
    """Space around a secret does not hide it."""
    assert Redactor(["  hunter2\n"]).text("is hunter2?") == "is ***?"


def test_short():
    """A short secret is masked only between non-alphanumeric neighbours."""
    assert Redactor(["a1"]).text("a1 (a1) _a1- a12 ba1 éa1 x=a1") == "*** (***) _***- a12 ba1 éa1 x=***"


def test_short_signs():
    """A short secret of signs is masked as a token."""
    assert Redactor(["$!"]).text("pin $! or a$!") == "pin *** or a$!"


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(SECRET, id="plain"),
        pytest.param(json.dumps(SECRET), id="json-ascii"),
        pytest.param(json.dumps(SECRET, ensure_ascii=False), id="json"),
        pytest.param(json.dumps(SECRET, ensure_ascii=False).replace("${", "$${"), id="hcl"),
        pytest.param(quote(SECRET), id="url-path"),
        pytest.param(quote(SECRET, safe=""), id="url"),
        pytest.param(quote_plus(SECRET), id="url-query"),
        pytest.param(re.sub("%..", lambda match: match[0].lower(), quote(SECRET)), id="url-lower-case"),
        pytest.param(SECRET.replace(",", "%!(PACKER_COMMA)"), id="packer"),
        pytest.param(base64.b64encode(SECRET.encode()).decode(), id="base64"),
        pytest.param(base64.urlsafe_b64encode(SECRET.encode()).decode(), id="base64-url"),
    ],
)
def test_forms(form: str):
    """Every written form of a secret is masked whole."""
    masked = Redactor([SECRET]).text(f"<{form}>")
    assert masked.replace('"', "") == "<***>"


def test_go_json():
    """What Go escapes in JSON is masked."""
    assert Redactor(["<key&lock>"]).text(r"x \u003ckey\u0026lock\u003e y") == "x *** y"


def test_shell():
    """What a shell quotes is masked."""
    assert Redactor(["it's me"]).text("+ echo 'it'\\''s me'") == "+ echo '***'"


def test_not_utf_8():
    """A secret that is not UTF-8 is masked as lines show it."""
    secret = b"caf\xe9-secret".decode(errors="surrogateescape")
    assert Redactor([secret]).text("got caf\\xe9-secret") == "got ***"


def test_lone_surrogate():
    """A lone surrogate in a secret does no harm."""
    assert Redactor(["bad\ud800secret"]).text(json.dumps("bad\ud800secret")) == '"***"'


def test_each_line():
    """Each line of a multi-line secret is masked alone."""
    lines = [line for line in re.split("[\r\n]+", PEM) if len(line) >= 4]
    assert [Redactor([PEM]).text(f"  {line}  ") for line in lines] == ["  ***  "] * 4


def test_multi_line():
    """A multi-line secret is masked in one piece."""
    assert Redactor([PEM]).text(f"key: {PEM}") == "key: ***\n"


def test_multi_line_json():
    """A multi-line secret in JSON shows nothing but its mask."""
    assert Redactor([PEM]).text(json.dumps({"key": PEM.strip()})) == '{"key": "***"}'


def test_base64_lines():
    """Base64 that is broken into lines is masked on each."""
    secret = "".join(chr(33 + index % 90) for index in range(200))
    for line in base64.encodebytes(secret.encode()).decode().splitlines():
        assert Redactor([secret]).text(line) == MASK


@settings(database=None, deadline=None)
@given(before=st.binary(max_size=7), after=st.binary(max_size=7))
def test_base64_within(before: bytes, after: bytes):
    """Base64 of a secret with something around it shows nothing of the secret's unambiguous part."""
    secret = b"correct horse battery"
    encoded = base64.b64encode(before + secret + after).decode()
    masked = Redactor([secret.decode()]).text(encoded)
    around = len(base64.b64encode(before)) + len(base64.b64encode(after))
    assert MASK in masked
    assert len(masked) - len(MASK) <= around + 4


@pytest.mark.parametrize("prefix", ["AKIA", "ASIA"])
def test_aws_key_id(prefix: str):
    """AWS key ids are masked without being given."""
    assert Redactor().text(f"key {prefix}IOSFODNN7EXAMPLE used") == "key *** used"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("aws_secret_access_key = wJal/rXU+tn", "aws_secret_access_key = ***"),
        ("AWS_SESSION_TOKEN=FwoG/x== next", "AWS_SESSION_TOKEN=*** next"),
        ("export AWS_SECRET_ACCESS_KEY='abc'", "export AWS_SECRET_ACCESS_KEY='***'"),
        ('{"SecretAccessKey": "abc", "SessionToken":"def"}', '{"SecretAccessKey": "***", "SessionToken":"***"}'),
        (r"{\"SecretAccessKey\": \"abc\"}", r"{\"SecretAccessKey\": \"***\"}"),
        ("<SecretAccessKey>abc</SecretAccessKey>", "<SecretAccessKey>***</SecretAccessKey>"),
        ("secret_key: abc", "secret_key: ***"),
        ("?X-Amz-Security-Token=abc%2F&X-Amz-Date=1", "?X-Amz-Security-Token=***&X-Amz-Date=1"),
    ],
)
def test_aws_assignment(text: str, masked: str):
    """What is assigned to one of AWS's secrets is masked without being given."""
    assert Redactor().text(text) == masked


def test_aws_name_masked():
    """An ordinary word as a secret does not uncover an AWS secret."""
    assert Redactor(["secret"]).text("aws_secret_access_key=abc") == "aws_***_access_key=***"


def test_aws_value_and_secret():
    """A secret with a delimiter in it is masked whole where AWS's value would end at the delimiter."""
    assert Redactor(["foo,bar"]).text("secret_key=foo,bar;x") == "secret_key=***;x"


def test_cut():
    """A cut moves to the beginning of the secret that it would go through."""
    redactor = Redactor(["hunter2"])
    assert [redactor.cut("ab hunter2 cd", at) for at in (2, 3, 4, 9, 10, 11)] == [2, 3, 3, 3, 10, 11]


def test_cut_at_the_beginning():
    """A cut moves behind a secret that the text begins with."""
    assert Redactor(["hunter2"]).cut("hunter2 cd", 3) == 7


def test_longest():
    """No form of a secret is longer than `longest`."""
    secret = (PEM * 100).strip()
    forms = [secret, json.dumps(secret)[1:-1], quote_plus(secret), base64.b64encode(secret.encode()).decode()]
    assert max(map(len, forms)) <= Redactor([secret]).longest


def test_cut_aws():
    """A cut does not part AWS's value from the name that gives it away."""
    text = "ab secret_key=abcdef cd"
    assert [Redactor().cut(text, at) for at in (3, 8, 14, 17, 20)] == [3, 3, 3, 3, 20]


@pytest.mark.parametrize(
    ("secret", "line"),
    [
        pytest.param("a" * 5000 + "b", "a" * 1_000_000, id="long-near-miss"),
        pytest.param("a" * 100 + "b", "a" * 1_000_000, id="near-miss"),
        pytest.param("a" * 100, "a" * 1_000_000, id="overlapping-itself"),
        pytest.param("zz", "secret_key" + "\\" * 1_000_000, id="backslashes"),
        pytest.param("zz", "secret_key " * 100_000, id="assignments-without-value"),
        pytest.param("zz", "secret_key=" + "x" * 1_000_000, id="long-value"),
        pytest.param("zz", " " * 1_000_000, id="blanks"),
    ],
)
def test_megabyte(secret: str, line: str):
    """No line of a megabyte takes long, however it is made."""
    redactor = Redactor([secret])
    before = time.process_time()
    redactor.text(line)
    assert time.process_time() - before < 5


def test_many_lines():
    """A hundred thousand lines take seconds."""
    redactor = Redactor([f"secret-number-{number}-{number * 7919}" for number in range(50)])
    lines = [f"2025-01-01T00:00:00 step {number}: secret-number of this and that, done" for number in range(100_000)]
    before = time.process_time()
    assert [redactor.text(line) for line in lines] == lines
    assert time.process_time() - before < 20


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_secret_name(name: str):
    """A name that says so is a secret's."""
    assert is_secret_name(name)


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_other_name(name: str):
    """A name that is only about a secret, or sounds like one, is not a secret's."""
    assert not is_secret_name(name)


def test_empty_name():
    """An empty name is not a secret's."""
    assert not is_secret_name("")

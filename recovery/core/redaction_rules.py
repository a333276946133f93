r"""
The tables of `redaction.py`: what a secret looks like, and beside which names one stands.

Every quantifier is bounded or runs over a class that cannot match its own stop, so a megabyte on one line costs
milliseconds, not minutes. Each rule keeps its first group and hides what follows.
"""

import re
from typing import Final

FORMS: Final = (
    r"hf_[A-Za-z0-9]{16,}",
    r"api_org_[A-Za-z0-9]{16,}",
    r"sk-(?:ant-|proj-|svcacct-|or-v1-|lf-)?[A-Za-z0-9_-]{16,}",
    r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}",
    r"gsk_[A-Za-z0-9]{20,}",
    r"nvapi-[A-Za-z0-9_-]{20,}",
    r"r8_[A-Za-z0-9]{20,}",
    r"xai-[A-Za-z0-9]{20,}",
    r"(?:AKIA|ASIA|AGPA|AIDA|AROA|ABIA|ACCA)[0-9A-Z]{16}",
    r"AIza[0-9A-Za-z_-]{35}",
    r"ya29\.[0-9A-Za-z_-]{20,}",
    r"GOCSPX-[A-Za-z0-9_-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"github_pat_[A-Za-z0-9_]{20,}",
    r"glpat-[A-Za-z0-9_-]{16,}",
    r"xox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"xapp-[0-9]-[A-Za-z0-9-]{10,}",
    r"npm_[A-Za-z0-9]{30,}",
    r"pypi-AgE[A-Za-z0-9_-]{30,}",
    r"dop_v1_[a-f0-9]{32,}",
    r"hvs\.[A-Za-z0-9_-]{20,}",
    r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    r"dckr_pat_[A-Za-z0-9_-]{20,}",
    r"[0-9]{8,10}:AA[A-Za-z0-9_-]{32,}",  # Telegram bots
    r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?",  # JWT
)
"""Tokens that tell themselves; lengths a little below the documented ones, for tokens cut by a log."""

FORM: Final = re.compile(r"(?<![A-Za-z0-9])(?:" + "|".join(FORMS) + r")")

_NAME_ENDS: Final = ("=", " ", ":", "'", '"', ",", "_", "-", "\t")
TRIGGERS: Final = (
    *("hf_", "sk-", "k_live_", "k_test_", "api_org_", "gsk_", "nvapi-", "r8_", "xai-", "akia", "asia", "agpa", "aida", "aroa", "abia"),
    *("acca", "aiza", "ya29.", "gocspx", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat", "glpat-", "xox", "xapp-", "npm_"),
    *("pypi-a", "dop_v1", "hvs.", "sg.", "dckr_", ":aa", "eyj", "@", "bearer", "basic", "authorization", "cookie", "slack", "secret"),
    *("passw", "passphrase", "pwd", "credential", "sig=", "signature="),
    *(f"{word}{end}" for word in ("token", "key", "keys") for end in _NAME_ENDS),
)
"""
A line that holds none of these, in lower case, has no secret of a known form or name: it is looked at once and left
alone. Plain `in` over these words took a fifth of the time of one pattern of them (10,000 lines of a real server's log).
"""

NAMED: Final = (
    r"(?:[A-Za-z0-9]{1,40}[-_.]){0,6}"
    r"(?:api[-_]?keys?|access[-_]?key(?:[-_]id)?|secret[-_]?key|account[-_]?key|private[-_]?key|signing[-_]?key|encryption[-_]?key|"
    r"(?:client[-_]?)?secret|passw(?:or)?d|passphrase|pwd|credentials?|"
    r"(?:hf|hub|auth|access|refresh|api|bearer|secret|session|id|github|gitlab|wandb|replicate|slack|bot|vault|aws|jwt|csrf)[-_]?token)"
)
"""
Names whose value is a secret, with up to six words in front. A bare `token` is handled apart: model configurations are
full of `eos_token`, `max_tokens` and `tokenizer`.
"""

_ENV_NAME: Final = r"(?:[A-Z0-9]{1,40}_){0,8}(?:TOKEN(?!IZ|S)|SECRET|PASSWORD|PASSWD|APIKEY|API_KEY|CREDENTIALS?)(?:_[A-Z0-9]{1,40}){0,4}"
_NOT_A_SECRET: Final = r"(?!(?:None|null|true|false|True|False|''|\"\"|\[\]|\[redacted\])(?:[\s,;)\]}'\"]|$))"
_VALUE: Final = _NOT_A_SECRET + r"(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|[^\s'\",;)\]}]+)"
"""A quoted string, or what stands up to the next blank, comma or bracket."""
_IS: Final = r"['\"]?(?:\s{0,4}(?:[:=]|,(?=\s?['\"])|=>)\s{0,4})"
"""Between a name and its value: `=`, `:`, `=>`, or the comma of an argument list."""
_START: Final = r"(?<![A-Za-z0-9])"
_OPTION: Final = r"(?:--?|x-)?"
_SIGNATURES: Final = r"sig|signature|key|x-amz-signature|x-amz-credential|x-amz-security-token|x-goog-signature"


def _behind(name: str, value: str) -> re.Pattern[str]:
    return re.compile(f"({name}){value}")


BESIDE_A_NAME: Final[tuple[re.Pattern[str], ...]] = (
    # scheme://user:pass@host, scheme://token@host, redis://:pass@host
    _behind(r"(?i:\b[a-z][a-z0-9+.-]{1,20}://)", r"[^\s/@'\"]{1,512}(?=@)"),
    _behind(r"https://hooks\.slack\.com/(?:services|workflows)/", r"[^\s'\"]+"),
    # Authorization: Bearer X; Bearer X; Cookie: X
    _behind(r"(?i:\b(?:bearer|basic)\s{1,4})(?!(?i:realm|auth|token|error|scheme))", r"[A-Za-z0-9+/._~=-]{8,}"),
    _behind(
        r"(?i:(?:proxy-)?authorization['\"]?\s{0,4}[:=,]\s{0,4}b?['\"]?(?:bearer|basic|token|digest)?\s{0,4})(?!\[redacted)",
        r"[^\s'\",]{4,}",
    ),
    _behind(r"(?i:(?:set-)?cookie['\"]?\s{0,4}[:=]\s{0,4}b?['\"]?)", r"[^'\"\n]{4,}"),
    # api_key=['X', 'Y']; --api-key=X; '--api-key', 'X'; X-Api-Key: X; HF_TOKEN=X; 'password': 'X'; --api-key X
    _behind(rf"(?i:{_START}{_OPTION}{NAMED}{_IS})", r"\[[^\]\n]{1,4096}\]"),
    _behind(rf"(?i:{_START}{_OPTION}{NAMED}{_IS})b?", _VALUE),
    _behind(rf"(?i:(?<![A-Za-z0-9-])--?{NAMED}\s{{1,4}})(?!-)", _VALUE),
    # a bare token, as an option, in a query or as a field
    _behind(rf"(?i:(?<![A-Za-z0-9_])(?:--|[?&]|x-)?token{_IS})b?", _VALUE),
    _behind(r"(?<![A-Za-z0-9-])--token\s{1,4}(?!-)", _VALUE),
    _behind(rf"(?i:[?&](?:{_SIGNATURES})=)", r"[^&\s'\"]{8,}"),
    # environment variables whose name says it anywhere: FOO_TOKEN_2=…, MY_SECRET_THING=…
    _behind(rf"\b{_ENV_NAME}['\"]?\s?[=:]\s?", _VALUE),
)

_STRING: Final = r"(?:'(?:[^'\\\n]|\\.)*(?:'|$)|\"(?:[^\"\\\n]|\\.)*(?:\"|$))"
_IDS: Final = r"(?:prompt_token_ids|output_token_ids|all_token_ids|new_token_ids|token_ids)"
_WORDS: Final = r"(?:prompts?|outputs?|messages|content|text|input|query|delta|reasoning|input_value)"

PROMPTS: Final[tuple[re.Pattern[str], ...]] = (
    _behind(rf"(?i:['\"]?\b{_IDS}['\"]?\s{{0,2}}[:=]\s{{0,2}})", r"[\[(][0-9,\s\[\]]*[\])]?"),
    _behind(r"(?i:['\"]?\b(?:messages|prompts?|input|input_value)['\"]?\s{0,2}[:=]\s{0,2})(?=[\[{])", r"[^\n]+"),
    _behind(rf"(?i:['\"]?\b{_WORDS}['\"]?\s{{0,2}}[:=]\s{{0,2}})", _STRING),
)
PROMPT_TRIGGERS: Final = (
    *("received request", "generated response", "generated streaming", "details:", "_token_ids", "dumping ", "newrequestdata"),
    *("completionrequest", "'messages'", '"messages"', "'prompt'", '"prompt"', "input_value="),
)
"""Lines on which vLLM prints what users wrote or were answered (VLLM-FACTS.md, section c)."""

BEGIN_KEY: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
END_KEY: Final = re.compile(r"-----END [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-----")
KEY_BODY: Final = re.compile(r"^(?:\([^)\n]{1,60}\) )?\s{0,8}[A-Za-z0-9+/]{60,80}={0,2}\s*$")

SECRET_NAME: Final = re.compile(rf"(?i:^{NAMED}$)|^{_ENV_NAME}$|(?i:^token$)")
"""Names of environment variables whose values are secret."""

#!/usr/bin/env bash
# outlines_core: a judge that is held to a schema with scores from 1 to 10 may answer 57, or -3.
#
# Version: outlines_core 0.2.14 with pydantic 2.14.3; Python 3.11.
# Expected: build_regex_from_schema, which generation is held to, keeps a schema's constraints, or raises: its
#   documentation says that it returns errors where a feature is not yet supported, and for `not` it does.
# Behaviour: minimum, maximum, exclusiveMinimum, multipleOf and uniqueItems are passed over, as is `pattern` beside
#   maxLength. Field(ge=1, le=10) of pydantic makes such schemas. Generation that is "guaranteed to be valid" gives
#   values that the same schema refuses, without a word; a mean of scores takes them in where nothing checks again.
# Remedy: enum (Literal[1, …, 10]), or a regex of one's own; and check answers with the schema once more.
# Seen (values that the regex lets through): "score of 1 to 10: ['1', '10', '0', '11', '57', '-3']; as Literal: ['1',
#   '10']; share of 0 to 1: ['0.5', '2.5', '-3']; three different numbers: ['[1, 1, 1]']; a code like a1, of at most 3:
#   ['a1', 'zzz']; `not`: ValueError"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet outlines_core==0.2.14 pydantic==2.14.3
cat > "$folder/try.py" <<'P'
import json
import re
from typing import Annotated, Literal

from outlines_core.json_schema import build_regex_from_schema
from pydantic import Field, TypeAdapter, ValidationError


def passes(kind, values):
    """What the regex lets through, of JSON texts."""
    regex = build_regex_from_schema(json.dumps(TypeAdapter(kind).json_schema()))
    return [value for value in values if re.fullmatch(regex, value)]


def valid(kind, values):
    def check(value):
        try:
            TypeAdapter(kind).validate_json(value)
        except ValidationError:
            return False
        return True

    return [value for value in values if check(value)]


SCORE = Annotated[int, Field(ge=1, le=10)]
SHARE = Annotated[float, Field(ge=0, le=1)]
CODE = Annotated[str, Field(pattern="^[a-f][0-9]+$", max_length=3)]
scores, shares, codes = ["1", "10", "0", "11", "57", "-3"], ["0.5", "2.5", "-3"], ['"a1"', '"zzz"']
of_score, of_share, of_code = passes(SCORE, scores), passes(SHARE, shares), passes(CODE, codes)
literal = passes(Literal[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], scores)
ranks = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 3, "maxItems": 3}
of_ranks = [x for x in ["[1, 1, 1]"] if re.fullmatch(build_regex_from_schema(json.dumps(ranks)), x)]
try:
    build_regex_from_schema('{"not": {"type": "string"}}')
    refused = "built"
except ValueError as error:
    refused = type(error).__name__
print(f"score of 1 to 10: {of_score}; as Literal: {literal}; share of 0 to 1: {of_share}; three different numbers: "
      f"{of_ranks}; a code like a1, of at most 3: {[json.loads(x) for x in of_code]}; `not`: {refused}")
assert valid(SCORE, scores) == literal == ["1", "10"] and of_score == scores
assert valid(SHARE, shares) == ["0.5"] and of_share == shares
assert valid(CODE, codes) == ['"a1"'] and of_code == codes
assert of_ranks and refused == "ValueError"
P
"$folder/env/bin/python" "$folder/try.py" 2>/dev/null

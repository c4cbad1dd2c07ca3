#!/usr/bin/env bash
# ftfy 6.3.1: what restore_byte_a0, replace_lossy_sequences and decode_inconsistent_utf8 do, with and without explanations.
#
# Guess, written down first: `explain` decides only whether steps are told, so that fix_and_explain gives the same text
# with explain=True and explain=False, and fix_text, which tells none, heeds the three options.
# Found: with explain=False the encoding is fixed with the default options, whatever the config says: it is not passed on
# to fix_encoding there. So fix_text heeds them in a config, of which explain is True unless said otherwise, but not as
# keyword arguments, with which explain is False. fix_encoding itself, given the config, heeds them.
#
# Exits with 1 if ftfy does something else by now.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ftfy==6.3.1 wcwidth==0.2.13
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import ftfy

# Each option, and mojibake that it repairs: a byte A0 that became a blank, a byte that was lost, and a sentence of which
# parts are mojibake.
CASES = {
    "restore_byte_a0": "Ð Ð°Ð´",
    "replace_lossy_sequences": "â€œHelloâ€\ufffd",
    "decode_inconsistent_utf8": "It was namedÂ \u2018antiparticlesâ€™ after antiâ€“particles",
}
print(f"ftfy {version('ftfy')}")
as_found = True
for option, text in CASES.items():
    off = ftfy.TextFixerConfig(uncurl_quotes=False)._replace(**{option: False})
    on = off._replace(**{option: True})
    told = {name: ftfy.fix_and_explain(text, c).text for name, c in (("on", on), ("off", off))}
    untold = ftfy.fix_and_explain(text, off._replace(explain=False)).text
    whole = ftfy.fix_text(text, off)
    by_name = ftfy.fix_text(text, uncurl_quotes=False, **{option: False})
    alone = ftfy.fix_encoding(text, off._replace(explain=False))
    print(f"{option}: {text!r}")
    print(f"  on                        {told['on']!r}")
    print(f"  off, explain=True         {told['off']!r}")
    print(f"  off, explain=False        {untold!r}")
    print(f"  off, fix_text, a config   {whole!r}")
    print(f"  off, fix_text, keywords   {by_name!r}")
    print(f"  off, fix_encoding         {alone!r}")
    as_found &= told["on"] != told["off"]  # the option matters to this text
    as_found &= untold == by_name == told["on"]  # and is not heeded here
    as_found &= whole == alone == told["off"]  # though it is here
sys.exit(0 if as_found else "ftfy behaves differently now")
PYTHON

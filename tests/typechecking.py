"""The type checker that the test run switches on for `wpo_notes` (see pyproject.toml)."""

from beartype import BeartypeConf, beartype

# As in PEP 484, an int is welcome where a float is expected.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

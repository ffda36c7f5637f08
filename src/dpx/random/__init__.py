"""Everything that draws or derives: keys and seeds from the operating system, ChaCha20, noise from words, host streams of samplers."""

from ._chacha import CHACHA20 as CHACHA20
from ._draws import (
    Law as Law,
    draw as draw,
    laplace_from_words as laplace_from_words,
    normal_from_words as normal_from_words,
)
from ._keys import (
    chacha_key as chacha_key,
    check_key as check_key,
    fresh_key as fresh_key,
    fresh_seed as fresh_seed,
    key_of_words as key_of_words,
    key_words as key_words,
    shared_key as shared_key,
    shared_seed as shared_seed,
)
from ._philox import Domain as Domain, check_seed as check_seed, generator as generator
from ._wide import multiply as multiply

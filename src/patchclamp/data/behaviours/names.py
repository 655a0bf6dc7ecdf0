"""First names of English, by the pronoun that most readers expect, for several behaviours."""

from __future__ import annotations

from patchclamp.data.behaviours.drawing import words

MEN = words(
    "John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew "
    "Anthony Mark Steven Paul Andrew Joshua Kevin Brian George Edward Jason Jeff Ryan Jacob "
    "Gary Eric Scott Larry Frank Samuel Jack Henry Peter Adam Simon Luke Oliver Harry"
)
WOMEN = words(
    "Mary Jessica Sarah Lisa Nancy Karen Betty Helen Sandra Carol Ruth Sharon Michelle Laura "
    "Emily Kim Deborah Amy Angela Ashley Emma Olivia Sophie Anna Alice Julia Kate Jane Rose "
    "Maria Claire Lucy Linda Susan Margaret Elizabeth Barbara Patricia Jennifer Rachel"
)

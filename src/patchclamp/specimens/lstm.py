"""A recurrent byte reader: embedding, `nn.LSTM`, and a linear readout at every position.

The recurrence is one fused call, so that gates and cell states are not visible
to module hooks.

Shapes: input_ids (batch, length) in 0..vocab - 1; logits (batch, length, vocab).
Source: Hochreiter & Schmidhuber 1997.
"""

from __future__ import annotations

from torch import Tensor, nn


class LSTMReader(nn.Module):
    """Predicts the next token at every position.

    Shapes: input_ids (batch, length); logits (batch, length, vocab).
    """

    def __init__(
        self, vocab: int = 256, width: int = 32, hidden: int = 64, num_layers: int = 1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=num_layers, batch_first=True)
        self.head = nn.Linear(hidden, vocab)

    def forward(self, input_ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(input_ids))
        logits: Tensor = self.head(states)
        return logits

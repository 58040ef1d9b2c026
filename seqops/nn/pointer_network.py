"""PointerNetwork: an output sequence whose symbols are places of the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..attention import pointer_scores
from .parts import check_positive, check_sequence, expect
from .rnn import LSTM

MODES = ("additive", "clipped_dot")
Context = tuple[Tensor, tuple[Tensor, Tensor]]


class PointerNetwork(torch.nn.Module):
    """Reads a sequence and points at its places, one after another: for sorting, hulls, tours.

        e_j, s = LSTM_enc(x);  d_i = LSTM_dec(start, x_{t_1}, x_{t_2}, ...), from the state s
        s_ij = w . tanh(W_q d_i + W_k e_j), or with "clipped_dot" clip tanh(<W_q d_i, W_k e_j> / sqrt(hidden))
        log p(t_i = j) = s_ij - log sum_j' exp s_ij'

    Args:
        channels: C, numbers of a step of x.
        hidden: units of both LSTMs and of the scores.
        mode: "additive", as published, or "clipped_dot" (Kool et al.), which is a product of matrices.
        clip: the largest score of "clipped_dot".
        device, dtype: of the parameters.

    Shapes: x [B, T, C], target [B, N] int64, the places that were pointed at -> log_p [B, N, T], where row i knows the
    targets before i. lengths [B], of the rows of x: places past them have log_p = -inf. It reads whole sequences.

    Initialisation: U(-0.08, 0.08), as published.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: N T hidden for the scores, of which no tensor [B, N, T, hidden] is made.

    Vinyals, Fortunato and Jaitly, "Pointer networks", 2015; Kool, van Hoof and Welling, "Attention, learn to solve
    routing problems!", 2019.
    """

    def __init__(
        self,
        channels: int,
        hidden: int = 256,
        mode: str = "additive",
        clip: float = 10.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, channels=channels, hidden=hidden)
        expect(mode in MODES, self, "mode", f"one of {', '.join(MODES)}", repr(mode))
        expect(clip > 0, self, "clip", "a number > 0", clip)
        self.channels, self.mode, self.clip = channels, mode, clip
        options = {"device": device, "dtype": dtype}
        self.encoder = LSTM(channels, hidden, batch_first=True, **options)
        self.decoder = LSTM(channels, hidden, batch_first=True, **options)
        self.query = torch.nn.Linear(hidden, hidden, bias=False, **options)
        self.key = torch.nn.Linear(hidden, hidden, bias=False, **options)
        self.start = torch.nn.Parameter(torch.empty(channels, **options))
        self.weight = torch.nn.Parameter(torch.empty(hidden, **options)) if mode == "additive" else None
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -0.08, 0.08)

    def forward(self, x: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        check_sequence(self, x, self.channels, letter="C")
        fits = target.ndim == 2 and target.shape[0] == x.shape[0] and not target.is_floating_point()
        got = f"{target.dtype} of shape {list(target.shape)}"
        expect(fits, self, "target", f"whole numbers [B, N] = [{x.shape[0]}, N]", got)
        keys, state = self.encode(x, lengths)
        start = self.start.to(x.dtype).expand(x.shape[0], 1, -1)
        chosen = x.gather(1, target[:, :-1, None].expand(-1, -1, self.channels))
        d, _ = self.decoder(torch.cat([start, chosen], 1)[:, : target.shape[1]], state)
        return self.point(d, keys, lengths)

    def encode(self, x: Tensor, lengths: Tensor | None = None) -> Context:
        """Keys [B, T, hidden], and the state that the decoder starts from."""
        if lengths is None:
            e, state = self.encoder(x)
        else:
            packed, state = self.encoder(pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False))
            e, _ = pad_packed_sequence(packed, True, total_length=x.shape[1])
        return self.key(e), state

    def point(self, d: Tensor, keys: Tensor, lengths: Tensor | None) -> Tensor:
        """d [B, N, hidden], keys [B, T, hidden] -> log_p [B, N, T]."""
        return pointer_scores(self.query(d), keys, self.weight, mode=self.mode, clip=self.clip, lengths=lengths)

    @torch.no_grad()
    def decode(self, x: Tensor, steps: int, lengths: Tensor | None = None, again: bool = False) -> Tensor:
        """The likeliest place at each of `steps` steps [B, steps]; unless `again`, no place twice.

        A row whose length is below `steps` and that has pointed at all its places points at place 0.
        """
        check_sequence(self, x, self.channels, letter="C")
        least = 1 if again else steps
        expect(steps == 0 or x.shape[1] >= least, self, "steps", f"at most T = {x.shape[1]} unless again", steps)
        keys, state = self.encode(x, lengths)
        read, places = self.start.to(x.dtype).expand(x.shape[0], 1, -1), []
        taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        for _ in range(steps):
            d, state = self.decoder(read, state)
            place = self.point(d, keys, lengths).squeeze(1).masked_fill(taken, -torch.inf).argmax(1, keepdim=True)
            if not again:
                taken = taken.scatter(1, place, True)
            read = x.gather(1, place[..., None].expand(-1, -1, self.channels))
            places.append(place)
        return torch.cat(places, 1) if places else taken[:, :0].long()

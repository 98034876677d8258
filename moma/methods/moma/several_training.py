"""MoMA's stage 2 on images of several subjects: Eq. 1 with Eq. 3 summed over them.

Letters: B samples, n subjects of the sample with most, T text tokens, E embedding, A added conditioning,
S side of the references.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.tokenizers import Encoding
from moma.methods.moma.attention import drop_background
from moma.methods.moma.method import MoMASubject
from moma.methods.moma.several import SeveralConditioning, SubjectRows
from moma.methods.moma.training import AdapterTraining
from moma.methods.prompts import Prompt, joined, sd_prompt
from moma.sampling.interface import Batch, Job, StepInputs


class SeveralTraining(AdapterTraining):
    """Stage 2 on images of any numbers of subjects: Eq. 3 summed, with each one's mask as its M_gen."""

    about = "as stage2, on images that may show several subjects (Eq. 3 summed)"
    several = True

    @classmethod
    def places(
        cls, tokenizers: Sequence[Any], caption: str, words: Sequence[str], ends: Sequence[int | None]
    ) -> list[tuple[int, ...]]:
        text = sd_prompt(joined(words), caption)
        found, start = [], len(text) - len(caption)
        for end in ends:
            spans = [tokenizer.encode(text).spans for tokenizer in tokenizers]
            stops = [[None if one is None else one[1] - start for one in each] for each in spans]
            found.append(tuple(0 if end is None or end not in each else each.index(end) for each in stops))
        return found

    def inputs(self, batch: Batch) -> StepInputs:
        present, n = batch["present"], batch["present"].shape[1]  # (B, n)
        text, added = self._read(batch["text_ids"], batch["m_gen"], batch["drop_text"])  # (B, T, ·), (B, A)
        layers, fused = self._reference(self._each(batch)), self.method.attention == "fused"  # of B * n rows
        embedding = batch["embedding"].masked_fill(batch["drop"][:, None, None], 0)  # (B, n, E)
        beta = self._beta(batch)[:, None, None, None]  # (B, 1, 1, 1)
        subjects = []
        for s in range(n):
            own = [layer.rows(slice(s, None, n)) for layer in layers]
            own = [drop_background(layer) for layer in own] if fused else own
            subjects.append(SubjectRows(self.adapter.context_keys_values(embedding[:, s]), own, beta))
        places = batch["places"][..., 0] * present  # (B, n), 0 where there is no word
        label = F.one_hot(places, text.shape[1]) * (places > 0)[..., None]  # (B, n, T)
        cond = SeveralConditioning(
            text,
            added,
            label.to(text),
            subjects,
            [new.scale for new in self.adapter.subject],
            present[..., None, None].expand(-1, -1, *batch["mean"].shape[-2:]),
            None,
            frozenset(),  # M_gen is given, not made
            self.method,
            rows_per_image=1,
        )
        return StepInputs(text, added, replace(cond.hook(0, batch["m_gen"]), subject_on=True))

    def _read(self, ids: Tensor, masks: Tensor, absent: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Text states and added conditioning of rows of ids, computed as drawing does.

        Args:
            ids: of the texts, (B, K*T).
            masks: in the size of the images that they are for.
            absent: bool (B,), texts that were dropped.
        """
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            states, pooled = self.base.encode_ids(ids, absent)
            return states, self.base.added_conditioning(pooled, *masks.shape[-2:])

    def _each(self, batch: Batch) -> Batch:
        """What the reference pass reads, B * n rows; the subjects of a sample share its noises and shift."""
        n = batch["present"].shape[1]
        each = {name: batch[name].flatten(0, 1) for name in ("ref_mean", "ref_std", "m_ref")}
        shared = ("ref_posterior_noise", "ref_noise", "shift")
        each |= {name: batch[name].repeat_interleave(n, dim=0) for name in shared}
        label, added = self._read(batch["label_ids"].flatten(0, 1), batch["m_ref"])  # (B * n, T, ·)
        each |= {"m_ref": each["m_ref"][:, None], "label": label}  # (B * n, 1, S, S)
        return each if added is None else each | {"label_added": added}

    def subjects(
        self, batch: Batch, words: Sequence[str], prompts: Sequence[str]
    ) -> list[tuple[MoMASubject, ...]]:
        layers = self._reference(self._each(batch | {"shift": torch.zeros_like(batch["shift"])}))
        count = batch["present"].shape[1]
        return [
            tuple(
                MoMASubject(
                    word,
                    None,
                    [layer.rows(slice(i * count + s, i * count + s + 1)) for layer in layers],
                    {prompt: batch["embedding"][i, s : s + 1]},
                )
                for s in range(int(batch["present"][i].sum()))
            )
            for i, (word, prompt) in enumerate(zip(words, prompts, strict=True))
        ]

    def jobs(self, batch: Batch, words: Sequence[str], prompts: Sequence[str]) -> list[Job]:
        """The texts are those of the cache, which names all subjects."""
        found, parts = [], len(self.base.tokenizers)
        for i, job in enumerate(super().jobs(batch, words, prompts)):
            ids = batch["text_ids"][i].chunk(parts)
            encodings = tuple(Encoding(tuple(one.tolist()), (), ()) for one in ids)
            places = batch["places"][i, : len(job.subjects), 0].tolist()
            labels = tuple((place,) if place else () for place in places)
            found.append(replace(job, text=Prompt(job.prompt, encodings, labels)))
        return found

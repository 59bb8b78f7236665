"""How the attention of a row is spread over "sp"."""

from dataclasses import dataclass

from sp_attention import Scheme

CU_SEQLENS, MASK = "cu_seqlens", "mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreading:
    """What one process knows nothing of.

    Attributes:
        scheme: of the work.
        documents_as: what attention gets that says where documents are: "cu_seqlens", or a "mask", of which no scheme
            knows before.
        nan_padding: whether queries, keys and values (or latents) are NaN at padding between documents.
        latent_keys: whether the latents travel, and not the keys and values that are made of them.
    """

    scheme: Scheme
    documents_as: str
    nan_padding: bool
    latent_keys: bool

    @property
    def is_ulysses(self) -> bool:
        """Whether whole sequences come in one exchange."""
        return self.scheme == BY_ULYSSES.scheme

    @property
    def told(self) -> str:
        """In words; empty for what rows have that say nothing of it."""
        scheme = "" if self.is_ulysses else f"{self.scheme}"
        by_mask = "documents as a mask" if self.documents_as == MASK else ""
        nan, latent = "NaN at padding" * self.nan_padding, "latent keys" * self.latent_keys
        return ", ".join(filter(None, (scheme, latent, by_mask, nan)))


BY_ULYSSES = Spreading(scheme=Scheme.ulysses(), documents_as=CU_SEQLENS, nan_padding=False, latent_keys=False)

"""What listeners would say of speech, as a model estimates it: a mean opinion score from 1 (bad) to 5 (excellent)."""

from pathlib import Path

import torch

from hfspeech.errors import UserError, nearest
from hfspeech.models.loading import best_device

SQUIM = "squim"
WEIGHTS = "squim_subjective_bvcc_daps.pth"


def load_mos_model(name):
    """Loads an estimator of mean opinion scores.

    Args:
        name: None for none; `squim`, torchaudio's `SQUIM_SUBJECTIVE`, whose weights (360 MB, CC BY-NC 4.0: no commercial
            use) torchaudio fetches from download.pytorch.org at the first use; or a file of these weights, or of others
            for the same network.

    Returns:
        None, or a `Squim`.

    Raises:
        UserError: no such estimator; its weights cannot be had; a file that does not hold them.
    """
    if name is None:
        return None
    from torchaudio.models import squim_subjective_base
    from torchaudio.pipelines import SQUIM_SUBJECTIVE

    path = Path(name).expanduser()
    if name != SQUIM and not path.is_file():
        raise UserError(
            f"There is no --mos_model {name}.{nearest(name, [SQUIM])} Give squim, or a file that exists with its "
            f"weights, such as {WEIGHTS}."
        )
    try:
        if name == SQUIM:
            model = SQUIM_SUBJECTIVE.get_model()
        else:
            model = squim_subjective_base()
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(
            f"The weights of --mos_model {name} cannot be had ({error}): check the network, fetch {WEIGHTS} from "
            "https://download.pytorch.org/torchaudio/models on another machine and give its path, or leave it out."
        ) from None
    except Exception:  # whatever the unpickler stumbles over, or weights of another network
        where = f"{torch.hub.get_dir()}/torchaudio/models/{WEIGHTS}" if name == SQUIM else name
        raise UserError(
            f"{where} does not hold the weights of torchaudio's SQUIM_SUBJECTIVE: delete it and fetch it again."
        ) from None
    return Squim(str(name), model)


class Squim:
    """Holds speech against clean recordings of other words: NORESQA-MOS in torchaudio, 95 million parameters.

    Calling it with a list of waveforms (float32, 16 kHz, half a second at least) and a list of as many recordings to hold
    them against returns a list of floats. One at a time: with padding, its network would hear the silence.

    Source: Manocha and Kumar 2022, "Speech quality assessment through MOS using non-matching references".
    """

    hub_commit = None

    def __init__(self, name, model):
        self.name, self.model = name, model.eval().to(best_device())

    @torch.no_grad()
    def __call__(self, waveforms, references):
        device = best_device()
        return [
            self.model(*(torch.as_tensor(sound, device=device)[None] for sound in pair)).item()
            for pair in zip(waveforms, references, strict=True)
        ]

"""Images of one set, brought to the size and channels that a model of another set takes."""

from torch import Tensor

from etflight.data.decoding import fit_to, with_channels
from etflight.data.files import Square
from etflight.data.preprocessing import Preprocessing
from etflight.data.sources import Batch, ImageSplit


class AdaptedSplit(ImageSplit):
    """A split whose images become grey or RGB and are resized (bilinearly, with antialiasing) and cropped at the centre.

    Args:
        images: The split.
        preprocessing: How the model takes its images.
        name: The name of the split's set, for errors.
    """

    def __init__(self, images: ImageSplit, preprocessing: Preprocessing, name: str) -> None:
        super().__init__(images.source, images.indices.numpy())
        self.labels = images.labels
        self._images, self._set = images, name
        self._channels, *self._size = preprocessing.input_size
        self._covered = [Square(side, preprocessing.crop_pct).side for side in self._size]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W that the model takes."""
        return self._channels, self._size[0], self._size[1]

    def __getitems__(self, positions: list[int]) -> Batch:
        """Images uint8 `[B, C, H, W]` of the model's size, and their own labels.

        Raises:
            UserError: The channels cannot be converted.
        """
        images, labels = self._images.__getitems__(positions)
        return self._adapted(images), labels

    def _adapted(self, images: Tensor) -> Tensor:
        return fit_to(with_channels(images, self._channels, self._set), self._size, self._covered).contiguous()

    def end_pass(self) -> None:
        """Tell the split that a pass ends."""
        self._images.end_pass()

"""Put trails to work in a model, and take them away."""

from tokenpaths.attachment.handle import Attachment as Attachment
from tokenpaths.attachment.handle import attach as attach
from tokenpaths.attachment.handle import attached as attached
from tokenpaths.attachment.handle import detach as detach
from tokenpaths.attachment.handle import is_attached as is_attached
from tokenpaths.attachment.handle import working as working

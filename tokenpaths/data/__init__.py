"""From text to batches: items, examples, encoding, mixing."""

from tokenpaths.data.contamination import Overlap as Overlap
from tokenpaths.data.contamination import contaminated as contaminated
from tokenpaths.data.contamination import exact as exact
from tokenpaths.data.contamination import shared_grams as shared_grams
from tokenpaths.data.encoding import encode as encode
from tokenpaths.data.encoding import encode_parts as encode_parts
from tokenpaths.data.encoding import encode_texts as encode_texts
from tokenpaths.data.examples import IGNORED as IGNORED
from tokenpaths.data.examples import Batch as Batch
from tokenpaths.data.examples import Example as Example
from tokenpaths.data.examples import collate as collate
from tokenpaths.data.items import Choice as Choice
from tokenpaths.data.items import Question as Question
from tokenpaths.data.items import Task as Task
from tokenpaths.data.items import Text as Text
from tokenpaths.data.mixing import Mix as Mix
from tokenpaths.data.mixing import MixedStream as MixedStream
from tokenpaths.data.mixing import mix as mix
from tokenpaths.data.splitting import split_texts as split_texts

"""Files and folders that are written whole or not at all, with a checksum: tensors, JSON and text. None is executed."""

from tokenpaths.files.documents import read_json as read_json
from tokenpaths.files.documents import read_lines as read_lines
from tokenpaths.files.documents import read_text as read_text
from tokenpaths.files.documents import strict_json as strict_json
from tokenpaths.files.documents import write_json as write_json
from tokenpaths.files.documents import write_text as write_text
from tokenpaths.files.sealing import TrailFileError as TrailFileError
from tokenpaths.files.sealing import check_folder as check_folder
from tokenpaths.files.sealing import digests as digests
from tokenpaths.files.sealing import printable as printable
from tokenpaths.files.tensors import VERSION as VERSION
from tokenpaths.files.tensors import TensorFile as TensorFile
from tokenpaths.files.tensors import filling as filling
from tokenpaths.files.tensors import read as read
from tokenpaths.files.tensors import write as write
from tokenpaths.files.writing import check_room as check_room
from tokenpaths.files.writing import sweep as sweep
from tokenpaths.files.writing import whole as whole

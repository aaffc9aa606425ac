"""What is laid where: trails at sites, and the notes that files keep of them."""

from tokenpaths.trailmap.adapter import Adapter as Adapter
from tokenpaths.trailmap.together import Together as Together
from tokenpaths.trailmap.trailmap import FILE_NAME as FILE_NAME
from tokenpaths.trailmap.trailmap import TrailMap as TrailMap

"""Where a trail lies: sites, and the model that they are found in, looked at once."""

from tokenpaths.site.host import Host as Host
from tokenpaths.site.host import Place as Place
from tokenpaths.site.host import find_blocks as find_blocks
from tokenpaths.site.host import sites as sites
from tokenpaths.site.host import width as width
from tokenpaths.site.site import Layers as Layers
from tokenpaths.site.site import Site as Site
from tokenpaths.site.site import Stream as Stream

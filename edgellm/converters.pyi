# For type checkers in a checkout: the build maps the folder converters/ to this name.
from converters import FORMATS as FORMATS
from converters import Report as Report
from converters import convert as convert
from converters import export as export
from converters import is_adapter as is_adapter
from converters import open_adapter as open_adapter
from converters import read as read
from converters import read_adapter as read_adapter

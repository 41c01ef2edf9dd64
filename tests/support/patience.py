"""How long tests wait for what must happen: set FIELDVIT_PATIENCE to a factor where all is slow, as in an emulator."""

import os

PATIENCE = float(os.environ.get("FIELDVIT_PATIENCE", "1"))

"""Routers, routes, the routed block and budget control. Pure torch: knows no Hugging Face and no data."""

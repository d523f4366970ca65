"""One pool of pages, page tables and lengths per (row, layer, head), statistics from the allocator."""

"""Pages and plots: what runs, studies, neighbour tables and evaluations measured, as HTML files without scripts."""

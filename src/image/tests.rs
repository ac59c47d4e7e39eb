//! Images written and read.

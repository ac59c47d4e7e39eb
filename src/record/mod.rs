//! The context: an owned buffer chain of framed headers, and the object table.

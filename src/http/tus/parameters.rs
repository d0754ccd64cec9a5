//! The headers that requests of the protocol carry, for the document.

use utoipa::openapi::path::Parameter;

use crate::http::openapi::{header, needed_header};

/// Of every request but `OPTIONS`.
pub fn speaking() -> Vec<Parameter> {
    vec![needed_header("Tus-Resumable", "`1.0.0`.")]
}

/// Of one that begins an upload; it may bring the first piece along.
pub fn creating() -> Vec<Parameter> {
    let mut headers = speaking();
    headers.push(needed_header("Upload-Length", "Of the whole file, in bytes."));
    let words = "Pairs of a name and, in base64, a value, comma separated: `filename` and \
                 `filetype` describe the file, others become its `metadata`. 16 KiB of JSON at \
                 most, decoded.";
    headers.push(header("Upload-Metadata", words));
    headers
}

/// Of one that brings a piece.
pub fn appending() -> Vec<Parameter> {
    let mut headers = speaking();
    headers.push(needed_header("Upload-Offset", "How far the upload is, in bytes."));
    headers
        .push(header("Upload-Checksum", "`sha1` or `sha256`, a blank, and the piece's in base64."));
    headers
}

/// Of one that stands for a PATCH or DELETE.
pub fn overriding() -> Vec<Parameter> {
    let mut headers = speaking();
    headers.push(needed_header("X-HTTP-Method-Override", "`PATCH` or `DELETE`."));
    headers.push(header("Upload-Offset", "Of a PATCH."));
    headers
}

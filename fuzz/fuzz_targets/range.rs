//! The range responder: whatever ranges and conditions a request has, the answer is a whole file, one
//! part of it, or a refusal; and a part lies within the file. The input is the file's size, then
//! headers, a line each.
#![no_main]

use std::ops::Range;

use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::test::TestRequest;
use actix_web::web::Bytes;
use futures_util::{FutureExt, stream};
use libfuzzer_sys::fuzz_target;
use t2m::http::ranges::{ServedFile, serve};

const NAMES: [&str; 6] =
    ["range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since"];

fuzz_target!(|data: &[u8]| {
    let Some((&size, rest)) = data.split_first() else { return };
    let file = ServedFile {
        sha256: "ab".repeat(32),
        size: u64::from(size),
        content_type: "video/mp4".to_owned(),
        filename: String::from_utf8_lossy(rest).into_owned(),
        modified: Some(1_767_225_600),
    };
    let mut request = TestRequest::get();
    for (name, value) in NAMES.into_iter().zip(rest.split(|byte| *byte == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(value) {
            request = request.append_header((HeaderName::from_static(name), value));
        }
    }
    let mut asked = None;
    let request = request.to_http_request();
    let answering = serve(&request, &file, async |range: Range<u64>| {
        assert!(range.start <= range.end && range.end <= file.size, "{range:?} of {size}");
        asked = Some(range);
        Ok(stream::empty::<Result<Bytes, std::io::Error>>())
    });
    let answer = answering.now_or_never().expect("it waits for nothing but the bytes");
    let Ok(response) = answer else { panic!("the bytes can be read") };
    let status = response.status().as_u16();
    assert!([200, 206, 304, 412, 416].contains(&status), "{status}");
    assert!(
        status != 200 || asked.is_none_or(|range| range == (0..file.size)),
        "a part as a whole"
    );
});

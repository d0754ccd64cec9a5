//! The reader of uploads: whatever comes as a multipart body, in whatever pieces, it is stored or
//! refused, and a name that is kept is one that any file system takes. The input's first byte is the
//! length of the pieces.
#![no_main]

use std::sync::LazyLock;

use actix_web::test::TestRequest;
use actix_web::{FromRequest, web};
use libfuzzer_sys::fuzz_target;
use t2m::config::BlobStore;
use t2m::http::quota::Allowance;
use t2m::http::upload::{MAX_METADATA_BYTES, Most, json_bytes, receive};
use t2m::media::blobs::Blobs;

static STORE: LazyLock<(tempfile::TempDir, Blobs)> = LazyLock::new(|| {
    let directory = tempfile::tempdir().expect("a directory");
    let blobs = Blobs::open(&BlobStore::File, directory.path()).expect("a store");
    (directory, blobs)
});

fuzz_target!(|data: &[u8]| {
    let (_, blobs) = &*STORE;
    actix_web::rt::System::new().block_on(async {
        let (request, mut payload) = TestRequest::post()
            .insert_header(("content-type", "multipart/form-data; boundary=B"))
            .set_payload(data.to_vec())
            .to_http_parts();
        let payload = web::Payload::from_request(&request, &mut payload).await.expect("a body");
        let most = Most { file: 10_000, fields: MAX_METADATA_BYTES };
        let upload = receive(&request, payload, blobs, most, &mut Allowance::unlimited()).await;
        if let Ok(upload) = upload {
            assert!(upload.size <= 10_000 && json_bytes(&upload.metadata) <= MAX_METADATA_BYTES);
            let name = upload.filename;
            assert!(!name.contains(['/', '\\', '\0', '\r', '\n']) && name.len() <= 255, "{name:?}");
        }
    });
});

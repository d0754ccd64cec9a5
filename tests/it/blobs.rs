//! What a blob store must do, asked of each: the local directory, and a real S3-protocol server.

use bytes::Bytes;
use chrono::TimeDelta;
use futures_util::TryStreamExt;
use sha2::{Digest, Sha256};
use t2m::clock::Clock;
use t2m::config::BlobStore;
use t2m::media::aside::GRACE;
use t2m::media::blobs::{Blobs, Error, Stored};
use tempfile::TempDir;

use crate::s3::S3;

const HELLO: &str = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9";

#[tokio::test]
async fn the_local_directory_conforms() {
    conforms(&BlobStore::File).await;
}

#[tokio::test]
async fn a_bucket_conforms() {
    let s3 = S3::start().await;
    conforms(&s3.store()).await;
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_noticed_at_the_start() {
    let s3 = S3::start().await;
    let BlobStore::S3 { prefix, aws, .. } = s3.store() else { unreachable!() };
    let store = BlobStore::S3 { bucket: "no-such-bucket".to_owned(), prefix, aws };
    let directory = TempDir::new().unwrap();
    assert!(Blobs::open(&store, directory.path()).unwrap().probe().await.is_err());
}

async fn conforms(store: &BlobStore) {
    let directory = TempDir::new().unwrap();
    let blobs = Blobs::open(store, directory.path()).unwrap();
    blobs.probe().await.unwrap();
    the_same_bytes_are_the_same_blob(&blobs).await;
    many_parts_come_back_whole(&blobs).await;
    an_empty_blob_is_one(&blobs).await;
    what_is_not_there_is_not_found(&blobs).await;
    a_writer_that_is_dropped_leaves_nothing(&blobs).await;
    a_spooled_file_is_adopted_once_and_again(&blobs).await;
    a_blob_goes_in_two_steps_and_can_be_read_until_the_last(&blobs).await;
    bytes_stored_again_outlive_the_destruction(&blobs).await;
    documents_are_replaced_and_listed(&blobs).await;
}

async fn put(blobs: &Blobs, bytes: &[u8]) -> Stored {
    let mut writer = blobs.writer().await.unwrap();
    writer.write(Bytes::copy_from_slice(bytes)).await.unwrap();
    writer.finish().await.unwrap()
}

async fn read(blobs: &Blobs, sha256: &str, range: std::ops::Range<u64>) -> Result<Vec<u8>, Error> {
    let chunks: Vec<Bytes> = blobs.read_range(sha256, range).try_collect().await?;
    Ok(chunks.concat())
}

/// Later than everything the store itself says of a blob written now.
fn later() -> chrono::DateTime<chrono::Utc> {
    Clock::system().now() + GRACE + TimeDelta::seconds(5)
}

async fn the_same_bytes_are_the_same_blob(blobs: &Blobs) {
    let stored = put(blobs, b"hello world").await;
    assert_eq!(stored, Stored { sha256: HELLO.into(), size: 11, sniffed: None });
    assert_eq!(put(blobs, b"hello world").await, stored);
    assert_eq!(blobs.size(HELLO).await.unwrap(), 11);
    assert_eq!(read(blobs, HELLO, 0..11).await.unwrap(), b"hello world");
    assert_eq!(read(blobs, HELLO, 6..8).await.unwrap(), b"wo");
    assert_eq!(read(blobs, HELLO, 3..3).await.unwrap(), b"");
}

async fn many_parts_come_back_whole(blobs: &Blobs) {
    let bytes: Vec<u8> = (0..11 * 1024 * 1024 + 17).map(|n: u32| (n % 251) as u8).collect();
    let stored = put(blobs, &bytes).await;
    assert_eq!(stored.sha256, hex::encode(Sha256::digest(&bytes)));
    let end = bytes.len() as u64;
    assert!(read(blobs, &stored.sha256, 0..end).await.unwrap() == bytes);
    assert_eq!(read(blobs, &stored.sha256, end - 3..end).await.unwrap(), bytes[bytes.len() - 3..]);
}

async fn an_empty_blob_is_one(blobs: &Blobs) {
    let stored = put(blobs, b"").await;
    assert_eq!((stored.size, blobs.size(&stored.sha256).await.unwrap()), (0, 0));
    assert_eq!(read(blobs, &stored.sha256, 0..0).await.unwrap(), b"");
}

async fn what_is_not_there_is_not_found(blobs: &Blobs) {
    let absent = "a".repeat(64);
    assert!(matches!(blobs.size(&absent).await, Err(Error::NotFound)));
    assert!(matches!(read(blobs, &absent, 0..3).await, Err(Error::NotFound)));
    assert!(matches!(blobs.bring_back(&absent).await, Err(Error::NotFound)));
    for name in ["", "../../etc/passwd", &HELLO.to_uppercase(), &HELLO[1..]] {
        assert!(matches!(blobs.size(name).await, Err(Error::NotFound)), "{name}");
    }
}

async fn a_writer_that_is_dropped_leaves_nothing(blobs: &Blobs) {
    let before = blobs.old(later()).await.unwrap().len();
    let mut writer = blobs.writer().await.unwrap();
    writer.write(vec![7; 6 * 1024 * 1024].into()).await.unwrap();
    drop(writer);
    assert_eq!(blobs.old(later()).await.unwrap().len(), before);
}

async fn a_spooled_file_is_adopted_once_and_again(blobs: &Blobs) {
    std::fs::create_dir_all(blobs.spool()).unwrap();
    std::fs::write(blobs.spool().join("x.part"), "spooled").unwrap();
    let sha256 = hex::encode(Sha256::digest("spooled"));
    let known = Stored { sha256: sha256.clone(), size: 7, sniffed: None };
    blobs.adopt("x.part", &known).await.unwrap();
    assert!(!blobs.spool().join("x.part").exists());
    assert_eq!(read(blobs, &sha256, 0..7).await.unwrap(), b"spooled");
    blobs.adopt("x.part", &known).await.unwrap();
    let unknown = Stored { sha256: "b".repeat(64), ..known };
    assert!(matches!(blobs.adopt("x.part", &unknown).await, Err(Error::NotFound)));
}

async fn a_blob_goes_in_two_steps_and_can_be_read_until_the_last(blobs: &Blobs) {
    let sha256 = put(blobs, b"goes away").await.sha256;
    assert!(!blobs.old(Clock::system().now()).await.unwrap().contains(&sha256), "it is young");
    assert!(blobs.old(later()).await.unwrap().contains(&sha256));
    blobs.put_aside(&sha256, later()).await.unwrap();
    blobs.put_aside(&sha256, later()).await.unwrap();
    assert!(!blobs.old(later()).await.unwrap().contains(&sha256));
    assert_eq!(read(blobs, &sha256, 0..4).await.unwrap(), b"goes");
    assert_eq!(blobs.size(&sha256).await.unwrap(), 9);
    assert!(blobs.bring_back(&sha256).await.unwrap());
    assert!(!blobs.bring_back(&sha256).await.unwrap(), "it is in its place");
    // A bucket keeps a copy aside, which is not the only one any more.
    for left in blobs.all_aside().await.unwrap() {
        blobs.destroy(&left).await.unwrap();
    }
    assert_eq!(read(blobs, &sha256, 0..4).await.unwrap(), b"goes");

    let now = later();
    blobs.put_aside(&sha256, now).await.unwrap();
    let aside = blobs.all_aside().await.unwrap();
    assert_eq!((aside.len(), &aside[0].sha256), (1, &sha256));
    assert_eq!(aside[0].since.timestamp(), now.timestamp());
    blobs.destroy(&aside[0]).await.unwrap();
    blobs.destroy(&aside[0]).await.unwrap();
    assert!(matches!(read(blobs, &sha256, 0..4).await, Err(Error::NotFound)));
}

async fn bytes_stored_again_outlive_the_destruction(blobs: &Blobs) {
    let sha256 = put(blobs, b"comes again").await.sha256;
    blobs.put_aside(&sha256, later()).await.unwrap();
    put(blobs, b"comes again").await;
    for aside in blobs.all_aside().await.unwrap() {
        blobs.destroy(&aside).await.unwrap();
    }
    assert_eq!(read(blobs, &sha256, 0..5).await.unwrap(), b"comes");
}

async fn documents_are_replaced_and_listed(blobs: &Blobs) {
    let documents = blobs.documents("letters");
    assert_eq!(documents.list().await.unwrap(), []);
    documents.put("a.json", b"1".to_vec()).await.unwrap();
    documents.put("a.json", b"2".to_vec()).await.unwrap();
    assert_eq!(documents.get("a.json").await.unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(documents.list().await.unwrap().len(), 1);
    documents.delete("a.json").await.unwrap();
    documents.delete("a.json").await.unwrap();
    assert_eq!(documents.get("a.json").await.unwrap(), None);
}

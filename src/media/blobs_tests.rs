//! What is kept under which name, and what is left behind.

use chrono::{DateTime, TimeDelta};
use object_store::memory::InMemory;

use super::*;

const HELLO: &str = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9";

fn blobs() -> (tempfile::TempDir, Blobs) {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(&BlobStore::File, dir.path()).unwrap();
    (dir, blobs)
}

async fn put(blobs: &Blobs, chunks: &[&'static [u8]]) -> Stored {
    let mut writer = blobs.writer().await.unwrap();
    for chunk in chunks {
        writer.write(Bytes::from_static(chunk)).await.unwrap();
    }
    writer.finish().await.unwrap()
}

async fn read(blobs: &Blobs, sha256: &str, range: Range<u64>) -> Result<Vec<u8>, Error> {
    let chunks: Vec<Bytes> = blobs.read_range(sha256, range).try_collect().await?;
    Ok(chunks.concat())
}

fn incoming(blobs: &Blobs) -> usize {
    std::fs::read_dir(blobs.root.join("incoming")).unwrap().count()
}

#[tokio::test]
async fn a_blob_is_named_by_its_bytes_and_read_by_range() {
    let (dir, blobs) = blobs();
    let stored = put(&blobs, &[b"hello", b" world"]).await;
    assert_eq!(stored, Stored { sha256: HELLO.into(), size: 11, sniffed: None });
    assert!(dir.path().join("blobs/sha256/b9").join(HELLO).is_file());
    assert_eq!(incoming(&blobs), 0);
    assert_eq!(blobs.size(HELLO).await.unwrap(), 11);
    assert_eq!(read(&blobs, HELLO, 0..11).await.unwrap(), b"hello world");
    assert_eq!(read(&blobs, HELLO, 6..8).await.unwrap(), b"wo");
    assert_eq!(read(&blobs, HELLO, 3..3).await.unwrap(), b"");
}

#[tokio::test]
async fn what_cannot_be_read_is_found_out_before_the_first_byte_is_given() {
    let (dir, blobs) = blobs();
    let stored = put(&blobs, &[b"hello", b" world"]).await;
    let place = dir.path().join("blobs/sha256/b9").join(HELLO);
    let begun = blobs.begin_range(HELLO, 6..11).await.unwrap();
    assert_eq!(begun.try_collect::<Vec<Bytes>>().await.unwrap().concat(), b"world");
    let nothing = blobs.begin_range(HELLO, 0..0).await.unwrap();
    assert_eq!(nothing.count().await, 0);
    // Cut by a damage of the disk, within what is asked for or before it.
    std::fs::write(&place, "hello w").unwrap();
    for range in [0..11, 6..11] {
        assert!(matches!(blobs.begin_range(HELLO, range).await, Err(Error::Io(_))));
    }
    assert!(blobs.begin_range(HELLO, 7..11).await.is_err());
    std::fs::remove_file(&place).unwrap();
    let gone = blobs.begin_range(&stored.sha256, 0..11).await;
    assert!(matches!(gone, Err(Error::NotFound)));
}

#[tokio::test]
async fn the_same_bytes_twice_are_one_blob() {
    let (_dir, blobs) = blobs();
    assert_eq!(put(&blobs, &[b"twice"]).await, put(&blobs, &[b"tw", b"ice"]).await);
}

#[tokio::test]
async fn parts_larger_than_the_buffer_come_back_whole() {
    let (_dir, blobs) = blobs();
    let bytes: Vec<u8> = (0..3 * PART_BYTES + 17).map(|n| (n % 251) as u8).collect();
    let mut writer = blobs.writer().await.unwrap();
    writer.write(bytes.clone().into()).await.unwrap();
    let stored = writer.finish().await.unwrap();
    assert_eq!(stored.sha256, hex::encode(Sha256::digest(&bytes)));
    let end = bytes.len() as u64;
    assert!(read(&blobs, &stored.sha256, 0..end).await.unwrap() == bytes);
}

#[tokio::test]
async fn the_first_bytes_tell_the_type() {
    let (_dir, blobs) = blobs();
    let stored = put(&blobs, &[b"\x89PN", b"G\r\n\x1a\n", b"rest"]).await;
    assert_eq!(stored.sniffed.as_deref(), Some("image/png"));
}

#[tokio::test]
async fn a_writer_dropped_unfinished_leaves_nothing() {
    let (_dir, blobs) = blobs();
    let mut writer = blobs.writer().await.unwrap();
    writer.write(vec![7; 2 * PART_BYTES].into()).await.unwrap();
    assert_eq!(incoming(&blobs), 1);
    drop(writer);
    // The store removes it on a blocking thread; bounded, so that a failure is a failure.
    tokio::time::timeout(std::time::Duration::from_secs(10), async {
        while incoming(&blobs) > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn what_a_crash_left_is_swept() {
    let (_dir, blobs) = blobs();
    std::fs::write(blobs.root.join("incoming/1-0#1"), "half").unwrap();
    assert_eq!(blobs.sweep_incoming().unwrap(), 1);
    assert_eq!(incoming(&blobs), 0);
}

#[tokio::test]
async fn what_is_elsewhere_or_only_read_makes_nothing_here() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = BlobStore::S3 {
        bucket: "far-away".to_owned(),
        prefix: "some".to_owned(),
        aws: vec![("AWS_REGION".to_owned(), "us-east-1".to_owned().into())],
    };
    assert_eq!(Blobs::open(&elsewhere, dir.path()).unwrap().sweep_incoming().unwrap(), 0);
    let data_dir = dir.path().join("not there");
    let blobs = Blobs::open_for_reading(&BlobStore::File, &data_dir).unwrap();
    assert_eq!(blobs.names_in("keys").await.unwrap(), [""; 0]);
    assert!(blobs.sizes().await.unwrap().is_empty() && blobs.file_of(HELLO).is_none());
    assert!(matches!(read(&blobs, HELLO, 0..11).await, Err(Error::NotFound)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something was made");
    let (there, blobs) = self::blobs();
    put(&blobs, &[b"hello world"]).await;
    let blobs = Blobs::open_for_reading(&BlobStore::File, there.path()).unwrap();
    assert_eq!(read(&blobs, HELLO, 0..11).await.unwrap(), b"hello world");
}

#[tokio::test]
async fn a_blob_that_cannot_be_completed_leaves_nothing() {
    let (_dir, blobs) = blobs();
    let mut writer = blobs.writer().await.unwrap();
    writer.write(Bytes::from_static(b"hello")).await.unwrap();
    // No file takes the place of a directory.
    let place = writer.leftover.0.clone();
    std::fs::create_dir(&place).unwrap();
    assert!(matches!(writer.finish().await, Err(Error::Store(_))));
    std::fs::remove_dir(&place).unwrap();
    assert_eq!(incoming(&blobs), 0);
}

#[tokio::test]
async fn a_rendered_file_is_moved_in() {
    let (dir, blobs) = blobs();
    let path = dir.path().join("video.mp4");
    std::fs::write(&path, "hello world").unwrap();
    assert_eq!(blobs.copy_in(&path).await.unwrap().sha256, HELLO);
    assert_eq!(blobs.put_file(&path).await.unwrap().sha256, HELLO);
    assert!(!path.exists());
}

#[tokio::test]
async fn what_was_put_aside_leaves_no_directory() {
    let (dir, blobs) = blobs();
    let aside = dir.path().join("blobs/aside");
    let left = || std::fs::read_dir(&aside).unwrap().count();
    let sha256 = put(&blobs, &[b"hello"]).await.sha256;
    let at = |second: i64| DateTime::UNIX_EPOCH + TimeDelta::seconds(second);
    blobs.put_aside(&sha256, at(1)).await.unwrap();
    assert!(blobs.bring_back(&sha256).await.unwrap());
    assert_eq!(left(), 0);
    blobs.put_aside(&sha256, at(2)).await.unwrap();
    put(&blobs, &[b"hello"]).await;
    blobs.put_aside(&sha256, at(3)).await.unwrap();
    let both = blobs.all_aside().await.unwrap();
    for (aside, rest) in both.iter().zip([1, 0]) {
        blobs.destroy(aside).await.unwrap();
        assert_eq!((blobs.all_aside().await.unwrap().len(), left()), (rest, rest));
    }
}

#[tokio::test]
async fn a_spooled_file_that_is_not_what_it_was_known_as_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::over(Arc::new(InMemory::new()), dir.path());
    std::fs::create_dir_all(blobs.spool()).unwrap();
    let path = blobs.spool().join("x.part");
    std::fs::write(&path, "hello w0rld").unwrap();
    let known = Stored { sha256: HELLO.into(), size: 11, sniffed: None };
    assert!(matches!(blobs.adopt("x.part", &known).await, Err(Error::Io(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"hello w0rld");
    std::fs::write(&path, "hello world").unwrap();
    blobs.adopt("x.part", &known).await.unwrap();
    assert!(!path.exists() && read(&blobs, HELLO, 0..5).await.unwrap() == b"hello");
}

#[tokio::test]
async fn only_hashes_are_names() {
    let (_dir, blobs) = blobs();
    for name in ["", "../../etc/passwd", &HELLO.to_uppercase(), &HELLO[1..]] {
        assert!(matches!(blobs.size(name).await, Err(Error::NotFound)), "{name}");
    }
}

#[tokio::test]
async fn what_is_brought_back_in_a_bucket_outlives_who_was_still_putting_it_aside() {
    let (dir, bucket) = (tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let blobs = Blobs::over(bucket.clone(), dir.path());
    let sha256 = put(&blobs, &[b"hello"]).await.sha256;
    let place = location(&sha256).unwrap();
    // A bucket moves in two steps: this is the first one.
    bucket.copy(&place, &Path::from(format!("aside/{sha256}/7"))).await.unwrap();
    for was_away in [false, true] {
        assert_eq!(blobs.bring_back(&sha256).await.unwrap(), was_away);
        assert!(bucket.head(&place).await.is_ok());
        // The second.
        bucket.delete(&place).await.unwrap();
        assert_eq!(read(&blobs, &sha256, 0..5).await.unwrap(), b"hello");
    }
}

#[test]
fn a_blob_in_s3_takes_its_time_unless_the_settings_say_otherwise() {
    use object_store::ClientConfigKey::{ReadTimeout, Timeout};
    use object_store::aws::AmazonS3ConfigKey::Client;
    let of = |aws: &[(&str, &str)], key| {
        let owned =
            |(name, value): &(&str, &str)| ((*name).to_owned(), Secret::from((*value).to_owned()));
        let aws: Vec<_> = aws.iter().map(owned).collect();
        s3("bucket", &aws, for_blobs()).get_config_value(&Client(key))
    };
    assert_eq!(of(&[], Timeout), None);
    assert_eq!(of(&[], ReadTimeout).as_deref(), Some("15m"));
    assert_eq!(of(&[("AWS_TIMEOUT", "5s"), ("AWS_PROFILE", "x")], Timeout).as_deref(), Some("5s"));
}

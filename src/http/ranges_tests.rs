//! Conditions, ranges and names; and the bytes of HEAD on a real connection.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use actix_web::{App, HttpServer, test::TestRequest, web};

use super::*;

const BYTES: &[u8] = b"0123456789";
const TAG: &str = "\"abc\"";
const STORED: &str = "Sun, 09 Sep 2001 01:46:40 GMT";
const LATER: &str = "Sun, 09 Sep 2001 01:46:41 GMT";
const EARLIER: &str = "Sun, 09 Sep 2001 01:46:39 GMT";

fn file() -> ServedFile {
    ServedFile {
        sha256: "abc".into(),
        size: 10,
        content_type: "video/mp4".into(),
        filename: "a.mp4".into(),
        modified: Some(1_000_000_000),
    }
}

type Chunk = Result<Bytes, std::io::Error>;

async fn read(range: Range<u64>) -> Result<impl Stream<Item = Chunk> + use<> + 'static, Problem> {
    let bytes = &BYTES[range.start as usize..range.end as usize];
    Ok(stream::iter([Ok(Bytes::from_static(bytes))]))
}

async fn answer(method: Method, headers: &[(&str, &str)]) -> HttpResponse {
    let mut request = TestRequest::default().method(method);
    for header in headers {
        request = request.append_header(*header);
    }
    serve(&request.to_http_request(), &file(), read).await.unwrap()
}

async fn get(headers: &[(&str, &str)]) -> (u16, String) {
    let response = answer(Method::GET, headers).await;
    let status = response.status().as_u16();
    let body = actix_web::body::to_bytes_limited(response.into_body(), 999).await.unwrap();
    (status, String::from_utf8(body.unwrap().to_vec()).unwrap())
}

#[actix_web::test]
async fn ranges_are_answered_as_the_rfc_says() {
    for (range, status, body) in [
        ("bytes=0-", 206, "0123456789"),
        ("bytes=5-9", 206, "56789"),
        ("bytes=5-5", 206, "5"),
        ("bytes=-5", 206, "56789"),
        ("bytes=-50", 206, "0123456789"),
        ("bytes=8-99999999999999999999", 206, "89"),
        ("Bytes=8-", 206, "89"),
        // Malformed or several: ignored.
        ("bytes=9-5", 200, "0123456789"),
        ("bytes=-", 200, "0123456789"),
        ("bytes=a-b", 200, "0123456789"),
        ("bytes=+1-2", 200, "0123456789"),
        ("bytes=0-1,3-4", 200, "0123456789"),
        ("lines=0-1", 200, "0123456789"),
        ("bytes", 200, "0123456789"),
    ] {
        assert_eq!(get(&[("range", range)]).await, (status, body.to_owned()), "{range}");
    }
    let twice = get(&[("range", "bytes=0-1"), ("range", "bytes=3-4")]).await;
    assert_eq!(twice.0, 200);
}

#[actix_web::test]
async fn a_range_past_the_end_is_unsatisfiable() {
    for range in ["bytes=10-", "bytes=10-12", "bytes=-0", "bytes=99999999999999999999-"] {
        let response = answer(Method::GET, &[("range", range)]).await;
        assert_eq!(response.status(), 416, "{range}");
        assert_eq!(response.headers().get("content-range").unwrap(), "bytes */10");
    }
    let empty = ServedFile { size: 0, ..file() };
    let request = TestRequest::default().insert_header(("range", "bytes=0-")).to_http_request();
    assert_eq!(serve(&request, &empty, read).await.unwrap().status(), 416);
    let whole = serve(&TestRequest::default().to_http_request(), &empty, read).await;
    assert_eq!(whole.unwrap().status(), 200);
}

#[actix_web::test]
async fn conditions_are_judged_in_order() {
    for (headers, status) in [
        (vec![("if-match", TAG)], 200),
        (vec![("if-match", "\"x\", \"abc\"")], 200),
        (vec![("if-match", "*")], 200),
        (vec![("if-match", "\"x\"")], 412),
        (vec![("if-match", "W/\"abc\"")], 412),
        (vec![("if-unmodified-since", STORED)], 200),
        (vec![("if-unmodified-since", EARLIER)], 412),
        (vec![("if-match", TAG), ("if-unmodified-since", EARLIER)], 200),
        (vec![("if-none-match", TAG)], 304),
        (vec![("if-none-match", "W/\"abc\"")], 304),
        (vec![("if-none-match", "\"x\"")], 200),
        (vec![("if-none-match", "\"x\""), ("if-modified-since", LATER)], 200),
        (vec![("if-modified-since", STORED)], 304),
        (vec![("if-modified-since", EARLIER)], 200),
        (vec![("if-modified-since", "yesterday")], 200),
        (vec![("if-none-match", TAG), ("range", "bytes=0-1")], 304),
        (vec![("if-range", TAG), ("range", "bytes=0-1")], 206),
        (vec![("if-range", "W/\"abc\""), ("range", "bytes=0-1")], 200),
        (vec![("if-range", STORED), ("range", "bytes=0-1")], 206),
        (vec![("if-range", LATER), ("range", "bytes=0-1")], 200),
        (vec![("if-range", "\"x\""), ("range", "bytes=99-")], 200),
    ] {
        assert_eq!(answer(Method::GET, &headers).await.status(), status, "{headers:?}");
    }
}

#[actix_web::test]
async fn an_answer_says_what_it_is() {
    let response = answer(Method::GET, &[("range", "bytes=2-3")]).await;
    for (name, value) in [
        ("etag", TAG),
        ("last-modified", STORED),
        ("accept-ranges", "bytes"),
        ("content-range", "bytes 2-3/10"),
        ("content-type", "video/mp4"),
        ("cache-control", "private, max-age=3600"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "sandbox"),
        ("content-disposition", "inline; filename=\"a.mp4\""),
    ] {
        assert_eq!(response.headers().get(name).unwrap(), value, "{name}");
    }
    let known = answer(Method::GET, &[("if-none-match", TAG)]).await;
    assert_eq!(known.headers().get("etag").unwrap(), TAG);
    assert!(known.headers().contains_key("cache-control"));
}

#[test]
fn only_media_are_shown_and_names_are_safe() {
    for (content_type, filename, expected) in [
        ("image/png", "a.png", "inline; filename=\"a.png\""),
        ("audio/mpeg", "a b.mp3", "inline; filename=\"a b.mp3\""),
        ("image/svg+xml", "a.svg", "attachment; filename=\"a.svg\""),
        ("IMAGE/SVG+XML", "a.svg", "attachment; filename=\"a.svg\""),
        ("text/html", "a.html", "attachment; filename=\"a.html\""),
        ("", "a", "attachment; filename=\"a\""),
        (
            "video/mp4",
            "é\"\r\n.mp4",
            "inline; filename=\"____.mp4\"; filename*=UTF-8''%C3%A9%22%0D%0A.mp4",
        ),
        ("video/mp4", "100%41", "inline; filename=\"100_41\"; filename*=UTF-8''100%2541"),
    ] {
        let (content_type, filename) = (content_type.to_owned(), filename.to_owned());
        let file = ServedFile { content_type, filename, ..file() };
        assert_eq!(disposition(&file), expected);
        assert!(HeaderValue::from_str(&disposition(&file)).is_ok());
    }
}

#[actix_web::test]
async fn bytes_that_cannot_be_read_are_refused_and_only_where_they_are_needed() {
    async fn unreadable(_: Range<u64>) -> Result<stream::Empty<Chunk>, Problem> {
        Err(Problem::new(Code::StorageUnavailable))
    }
    for (method, headers, expected) in [
        (Method::GET, ("accept", "*/*"), Err(Code::StorageUnavailable)),
        (Method::GET, ("range", "bytes=2-3"), Err(Code::StorageUnavailable)),
        (Method::GET, ("range", "bytes=10-"), Ok(416)),
        (Method::GET, ("if-none-match", TAG), Ok(304)),
        (Method::HEAD, ("accept", "*/*"), Ok(200)),
    ] {
        let request = TestRequest::default().method(method).insert_header(headers);
        let served = serve(&request.to_http_request(), &file(), unreadable).await;
        let told = served.map(|it| it.status().as_u16()).map_err(|problem| problem.code());
        assert_eq!(told, expected, "{headers:?}");
    }
}

#[actix_web::test]
async fn head_has_the_length_and_no_body_on_the_wire() {
    async fn handler(req: HttpRequest) -> Result<HttpResponse, Problem> {
        serve(&req, &file(), read).await
    }
    let app = || {
        App::new().service(
            web::resource("/f").route(web::get().to(handler)).route(web::head().to(handler)),
        )
    };
    let server = HttpServer::new(app).workers(1).bind("127.0.0.1:0").unwrap();
    let address = server.addrs()[0];
    let running = server.run();
    let handle = running.handle();
    actix_web::rt::spawn(running);
    let talk = move |request: &'static str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let head = "HEAD /f HTTP/1.1\r\nhost: x\r\nrange: bytes=0-1\r\nconnection: close\r\n\r\n";
    let get = "GET /f HTTP/1.1\r\nhost: x\r\nrange: bytes=0-1\r\nconnection: close\r\n\r\n";
    let answers = tokio::task::spawn_blocking(move || (talk(head), talk(get)));
    let (head, get) = answers.await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.to_lowercase().contains("content-length: 10\r\n"), "{head}");
    assert!(head.ends_with("\r\n\r\n"), "{head}");
    assert!(get.starts_with("HTTP/1.1 206"), "{get}");
    assert!(get.ends_with("\r\n\r\n01"), "{get}");
    handle.stop(false).await;
}

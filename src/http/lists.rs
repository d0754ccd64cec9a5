//! Pages of a list: `?limit=` and `?cursor=`, and the form of the answer (CONTRACT §2).

use actix_web::{FromRequest, HttpRequest, dev::Payload, web};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::future::{Ready, ready};
use url::form_urlencoded;

use super::problem::{Code, Problem};
use crate::actors::{dead_letters, records};
use crate::views::{Cursor, SessionCursor};

const DEFAULT: usize = 50;
const MAX: usize = 200;

/// The page that a request asks for.
#[derive(Debug)]
pub struct PageQuery<C = Cursor> {
    pub limit: usize,
    pub cursor: Option<C>,
}

/// What can say where a page ended.
pub trait AnyCursor: Sized {
    /// None for a text that no page of the list has given out.
    fn parse_text(text: &str) -> Option<Self>;
}

impl AnyCursor for Cursor {
    fn parse_text(text: &str) -> Option<Self> {
        Self::parse(text).ok()
    }
}

impl AnyCursor for SessionCursor {
    fn parse_text(text: &str) -> Option<Self> {
        Self::parse(text)
    }
}

impl AnyCursor for dead_letters::Cursor {
    fn parse_text(text: &str) -> Option<Self> {
        Self::parse(text)
    }
}

impl AnyCursor for records::Order {
    fn parse_text(text: &str) -> Option<Self> {
        Self::parse(text)
    }
}

/// The `data` of a list.
#[derive(Debug, Serialize)]
pub struct PageAnswer<T> {
    pub items: Vec<T>,
    pub next_cursor: Option<String>,
}

/// The query of every list, as it comes.
#[derive(Deserialize, utoipa::IntoParams)]
pub struct PageParameters {
    /// 1 to 200; 50 if absent.
    #[param(value_type = Option<u64>, minimum = 1, maximum = 200)]
    limit: Option<String>,
    /// `next_cursor` of the page before; the first page if absent.
    cursor: Option<String>,
}

impl<C: AnyCursor> FromRequest for PageQuery<C> {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(parse(request))
    }
}

/// The query of a list, or what of it `T` knows. One that gives a parameter twice is refused: with
/// neither, more would be listed than was asked for.
///
/// # Errors
/// 422, naming the parameters.
pub fn query<T: DeserializeOwned>(request: &HttpRequest) -> Result<T, Problem> {
    let text = request.query_string();
    web::Query::from_query(text).map(web::Query::into_inner).map_err(|error| {
        let names: Vec<_> = form_urlencoded::parse(text.as_bytes()).map(|(name, _)| name).collect();
        let again = names.iter().enumerate().filter(|(at, name)| names[..*at].contains(name));
        let words = Value::from("must be given once");
        let faults: Map<_, _> = again.map(|(_, name)| (name.to_string(), words.clone())).collect();
        match faults.is_empty() {
            false => Problem::fields(faults),
            true => Problem::new(Code::ValidationFailed).caused_by(error.to_string()),
        }
    })
}

fn parse<C: AnyCursor>(request: &HttpRequest) -> Result<PageQuery<C>, Problem> {
    let mut faults = Map::new();
    let raw: PageParameters = query(request)?;
    let limit = match raw.limit.as_deref().map(str::parse::<usize>) {
        None => DEFAULT,
        Some(Ok(limit)) if (1..=MAX).contains(&limit) => limit,
        Some(_) => {
            faults.insert("limit".into(), Value::from("must be a whole number from 1 to 200"));
            DEFAULT
        }
    };
    let cursor = match raw.cursor.as_deref().map(C::parse_text) {
        None => None,
        Some(Some(cursor)) => Some(cursor),
        Some(None) => {
            faults.insert("cursor".into(), Value::from("is not a cursor of this list"));
            None
        }
    };
    if faults.is_empty() { Ok(PageQuery { limit, cursor }) } else { Err(Problem::fields(faults)) }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn a_query_that_is_not_clear_is_refused() {
        let told = |query: &str| {
            let request = TestRequest::default().uri(&format!("/jobs?{query}")).to_http_request();
            let page = parse::<Cursor>(&request);
            page.map(|page| page.limit).map_err(|problem| problem.body()["detail"].clone())
        };
        assert_eq!(told(""), Ok(DEFAULT));
        assert_eq!(told("limit=7&state=queued&state=failed&%ff=%ff"), Ok(7));
        for (query, field) in [
            ("limit=0", "limit"),
            ("limit=", "limit"),
            ("limit=7&limit=7", "limit"),
            ("limit=7&%6cimit=8", "limit"),
            ("cursor=x", "cursor"),
            ("limit=1&cursor=&cursor=", "cursor"),
        ] {
            let detail = told(query).unwrap_err();
            let fields = detail["fields"].as_object().unwrap();
            assert_eq!(fields.keys().collect::<Vec<_>>(), [field], "{query}");
        }
    }
}

//! Pages of a list: `?limit=` and `?cursor=`, and the form of the answer (CONTRACT §2).

use actix_web::{FromRequest, HttpRequest, dev::Payload, web};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::future::{Ready, ready};

use super::problem::Problem;
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
#[derive(Default, Deserialize, utoipa::IntoParams)]
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

fn parse<C: AnyCursor>(request: &HttpRequest) -> Result<PageQuery<C>, Problem> {
    let mut faults = Map::new();
    let raw = web::Query::<PageParameters>::from_query(request.query_string());
    let raw = raw.map(web::Query::into_inner).unwrap_or_default();
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

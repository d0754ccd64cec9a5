//! The front end: routes, who may use them, and the form of every answer (CONTRACT §2).
//!
//! A handler reads like the sentence in the documentation: who asks, what is asked, do it, show
//! it. It knows actors and views; never the log's insides, SQL or files.

pub mod admin;
pub mod app;
pub mod batch;
pub mod callbacks;
pub mod caller;
pub mod dead_letters;
pub mod files;
pub mod health;
pub mod jobs;
pub mod links;
pub mod me;
pub mod metrics;
pub mod openapi;
pub mod operations;
pub mod routes;
pub mod sessions;
pub mod streams;
pub mod trace;
pub mod translations;
pub mod tus;
pub mod webhooks;
pub mod worker;

pub mod address;
pub mod analytics;
pub mod answer;
pub mod body;
pub mod edges;
pub mod gate;
pub mod identity;
pub mod json;
pub mod lists;
pub mod problem;
pub mod quota;
pub mod ranges;
pub mod rates;
pub mod replay;
pub mod room;
pub mod traffic;
pub mod upload;

"""LangChain with a model of this machine, through the server (pip install langchain-openai):

edgellm serve smollm2 &
python examples/langchain_server.py [http://127.0.0.1:8080/v1]
"""

import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int
    city: str


url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1"
model = ChatOpenAI(base_url=url, api_key="none", model="smollm2", temperature=0, max_tokens=60)

prompt = ChatPromptTemplate.from_messages([("system", "Answer in one short sentence."), ("user", "{question}")])
chain = prompt | model | StrOutputParser()
for piece in chain.stream({"question": "What is the capital of France?"}):
    print(piece, end="", flush=True)
print()

extract = model.with_structured_output(Person, method="json_schema")
print(extract.invoke("Extract name, age and city of the person: Anna Schmidt, 34, moved to Berlin last year."))
